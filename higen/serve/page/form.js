// The form for a model. It is made from the model's controls, sizes and loops as the server describes them.

import { fieldOf } from './fields.js';
import { make, titled } from './dom.js';
import { promptField } from './prompt.js';

const MOST_SIDE = 4096;

/** A labelled field for a number. Empty means the model's default. */
function number(name, title, properties = {}) {
  const input = make('input', { id: `ask-${name}`, type: 'number', step: '1', ...properties });
  return { input, element: make('div', { class: 'field', dataset: { field: name } }, make('label', { for: input.id }, title), input) };
}

const given = (input) => (input.value === '' ? undefined : Number(input.value));

/** One number, or one for each loop; undefined if none is given. */
function perLoop(inputs, loops, name) {
  if (inputs.every((input) => input.value === '')) return undefined;
  const values = inputs.map((input, i) => given(input) ?? loops[i][name]);
  return values.length === 1 ? values[0] : values;
}

/** A form for `model`, one of `models`. `actions`: submit(fields), change(model name). */
export function buildForm(root, models, model, actions) {
  const { sizes, loops } = model;
  const length = sizes.num_frames;
  const submit = () => root.requestSubmit();
  const prompt = promptField(model, submit);

  const chooser = make('select', { id: 'model', on: { change: () => actions.change(chooser.value) } },
    ...models.map((one) => make('option', { value: one.id, textContent: one.id, selected: one === model })));
  const choice = make('div', { class: 'field model', dataset: { field: 'model' }, hidden: models.length < 2 },
    make('label', { for: 'model' }, 'Model'), chooser);

  const frames = number('num_frames', 'Frames', { min: length.minimum, max: length.maximum, value: String(length.default) });
  const slide = make('input', { type: 'range', min: length.minimum, max: length.maximum, step: 1, 'aria-label': 'Frames' });
  slide.value = String(length.default);
  slide.hidden = length.minimum === length.maximum;
  const seconds = make('output', { class: 'quiet seconds' });
  const fps = number('fps', 'Frames per second', { min: 1, max: 240, placeholder: String(sizes.fps) });
  const side = { min: sizes.multiple, max: MOST_SIDE, step: sizes.multiple };
  const width = number('width', 'Width', { ...side, value: String(sizes.width) });
  const height = number('height', 'Height', { ...side, value: String(sizes.height) });
  width.element.dataset.field = height.element.dataset.field = 'size';
  const seed = make('input', { id: 'ask-seed', inputMode: 'numeric', placeholder: 'random', pattern: '-?[0-9]*', autocomplete: 'off' });
  const seedRow = make('div', { class: 'field', dataset: { field: 'seed' } }, make('label', { for: seed.id }, 'Seed'), seed);

  const negative = make('textarea', { id: 'ask-negative', rows: 2 });
  const steps = loops.map((loop, i) => number(`num_inference_steps-${i}`, title('Steps', loop), { min: 1, max: 1000, placeholder: String(loop.num_inference_steps) }));
  const guidance = loops.map((loop, i) => number(`guidance_scale-${i}`, title('Guidance', loop), { min: 0, step: 'any', placeholder: String(loop.guidance_scale) }));
  for (const [name, rows] of [['num_inference_steps', steps], ['guidance_scale', guidance]])
    for (const row of rows) row.element.dataset.field = name;
  const known = loops.length ? loops[0].solvers.filter((name) => loops.every((loop) => loop.solvers.includes(name))) : [];
  const solver = make('select', { id: 'ask-solver' }, make('option', { value: '', textContent: 'the model’s default' }),
    ...known.map((value) => make('option', { value, textContent: value })));
  const preset = make('select', { id: 'ask-preset' },
    make('option', { value: '', textContent: model.usual_preset ? `${model.usual_preset}, if nothing else is set` : 'none' }),
    ...model.presets.map((value) => make('option', { value, textContent: value })));

  const fields = new Map(Object.entries(model.controls.properties).map(([name, schema]) => [name, fieldOf(name, schema, length.default)]));
  const isPlain = (name) => ['number', 'whole', 'text'].includes(model.controls.properties[name]['x-kind']);
  const shown = [...fields].filter(([name]) => !isPlain(name)).map(([, field]) => field.element);
  const more = [...fields].filter(([name]) => isPlain(name)).map(([, field]) => field.element);
  const go = make('button', { class: 'main', type: 'submit', textContent: 'Make video' });

  const settings = make('details', { class: 'settings' });

  function title(word, loop) {
    return loops.length > 1 ? `${word}, ${titled(loop.name).toLowerCase()}` : word;
  }

  root.replaceChildren(
    prompt.element, make('div', { class: 'go' }, go, choice), settings);
  settings.append(make('summary', {}, 'Settings'), ...shown,
    make('fieldset', { class: 'field plain-set' }, make('legend', {}, 'Length and size'),
      make('div', { class: 'frames' }, frames.element, slide, seconds),
      make('div', { class: 'grid' }, width.element, height.element, seedRow, fps.element)),
    make('details', { class: 'more' }, make('summary', {}, 'More settings'),
      make('div', { class: 'field', dataset: { field: 'negative_prompt' } }, make('label', { for: negative.id }, 'What it should not show'), negative),
      make('div', { class: 'grid' }, ...steps.flatMap((row, i) => [row.element, guidance[i].element])),
      known.length > 1 ? make('div', { class: 'field', dataset: { field: 'solver' } }, make('label', { for: solver.id }, 'Solver'), solver) : null,
      model.presets.length ? make('div', { class: 'field', dataset: { field: 'preset' } }, make('label', { for: preset.id }, 'Preset'), preset) : null,
      ...more),
    make('p', { class: 'hint' }, `Licence of the model: ${model.licence}`),
  );
  // On a wide screen the settings are open; on a phone they would hide the result.
  const isWide = matchMedia('(min-width: 46rem)');
  settings.open = isWide.matches;
  isWide.onchange = () => { settings.open = isWide.matches; };

  function framesChanged() {
    const count = Number(frames.input.value);
    const rate = given(fps.input) ?? sizes.fps;
    seconds.textContent = count > 0 && rate > 0 ? `${Number((count / rate).toFixed(2))} s` : '';
    for (const field of fields.values()) field.frames?.(count);
  }
  frames.input.addEventListener('input', () => { slide.value = frames.input.value; framesChanged(); });
  slide.addEventListener('input', () => { frames.input.value = slide.value; framesChanged(); });
  fps.input.addEventListener('input', framesChanged);
  root.oninput = () => mark(null);
  framesChanged();

  /** The request's fields. Waits until files are read. */
  async function read() {
    const controls = {};
    for (const [name, field] of fields) {
      const value = await field.value();
      if (value !== undefined) controls[name] = value;
    }
    const all = {
      prompt: prompt.value(), model: model.id, seed: seed.value.trim() || -1, num_frames: given(frames.input),
      size: `${width.input.value || sizes.width}x${height.input.value || sizes.height}`, fps: given(fps.input),
      negative_prompt: negative.value || undefined, solver: solver.value || undefined,
      preset: preset.value || undefined,
      num_inference_steps: perLoop(steps.map((row) => row.input), loops, 'num_inference_steps'),
      guidance_scale: perLoop(guidance.map((row) => row.input), loops, 'guidance_scale'),
    };
    return { ...Object.fromEntries(Object.entries(all).filter(([, value]) => value !== undefined)), controls };
  }

  /** Mark the field that the server refused. `param`: the name of a field or control; null: mark none. */
  function mark(param) {
    for (const element of root.querySelectorAll('[aria-invalid]')) element.removeAttribute('aria-invalid');
    const field = param && [...root.querySelectorAll('[data-field]')].find((one) => one.dataset.field === param);
    const input = field?.querySelector('[role=slider], textarea, select, input');
    if (!input) return;
    for (let one = field.closest('details'); one; one = one.parentElement.closest('details')) one.open = true;
    if (input.getAttribute('role') !== 'slider') input.setAttribute('aria-invalid', 'true');
    input.focus();
  }

  /** Fill the form with a job's request, without its files. Returns the names of values without a field. */
  function fill(job) {
    const [w, h] = job.size.split('x');
    prompt.fill(job.prompt);
    Object.assign(width.input, { value: w });
    Object.assign(height.input, { value: h });
    frames.input.value = slide.value = String(job.num_frames);
    fps.input.value = job.fps === sizes.fps ? '' : String(job.fps);
    seed.value = String(job.seed);
    negative.value = job.negative_prompt ?? '';
    const lost = [];
    const text = (value, name) => {
      if (typeof value !== 'number' && value !== undefined && value !== null) lost.push(name);
      return typeof value === 'number' ? String(value) : '';
    };
    for (const [rows, values, name] of [[steps, job.num_inference_steps, 'steps'], [guidance, job.guidance_scale, 'guidance of each frame']]) {
      const isOne = Array.isArray(values) && values.length !== rows.length; // a list for one loop
      rows.forEach((row, i) => { row.input.value = text(Array.isArray(values) && !isOne ? values[i] : values, name); });
    }
    if (job.solver && !known.includes(job.solver)) lost.push('solver');
    solver.value = typeof job.solver === 'string' && known.includes(job.solver) ? job.solver : '';
    preset.value = model.presets.includes(job.preset) ? job.preset : '';
    framesChanged();
    for (const [name, field] of fields) field.fill(job.controls[name]);
    mark(null);
    return [...new Set(lost)];
  }

  return { read, mark, fill, fields, focus: prompt.focus, model };
}
