// Fields for the other controls of a model: numbers, choices, texts, pictures and clips. Each has element, value() and
// fill().

import { curveField } from './curve.js';
import { complain, make, titled } from './dom.js';

function row(name, input, hint, ...more) {
  input.id = `control-${name}`;
  if (hint) input.setAttribute('aria-describedby', `${input.id}-hint`);
  return make('div', { class: 'field', dataset: { field: name } },
    make('label', { for: input.id }, titled(name)), input, ...more,
    hint ? make('p', { class: 'hint', id: `${input.id}-hint` }, hint) : null);
}

function numberField(name, schema) {
  const number = (schema.anyOf ?? []).find((one) => one.type) ?? {};
  const plain = schema.default === null ? '' : String(schema.default);
  const input = make('input', {
    type: 'number', step: number.type === 'integer' ? '1' : 'any', placeholder: plain || 'the model’s choice',
    min: number.minimum, max: number.maximum, inputMode: number.type === 'integer' ? 'numeric' : 'decimal',
  });
  return {
    element: row(name, input, schema.description),
    value: () => (input.value === '' ? undefined : Number(input.value)),
    fill: (value) => { input.value = typeof value === 'number' ? String(value) : ''; },
  };
}

function choiceField(name, schema) {
  const options = schema.enum.map((value) => make('option', { value, textContent: value }));
  const input = make('select', {}, ...options);
  input.value = schema.default ?? schema.enum[0];
  return {
    element: row(name, input, schema.description),
    value: () => (input.value === schema.default ? undefined : input.value),
    fill: (value) => { input.value = schema.enum.includes(value) ? value : schema.default ?? schema.enum[0]; },
  };
}

function textField(name, schema) {
  const input = make('textarea', { rows: 2, placeholder: schema.default ?? '' });
  return {
    element: row(name, input, schema.description),
    value: () => (input.value === '' ? undefined : input.value),
    fill: (value) => { input.value = typeof value === 'string' ? value : ''; },
  };
}

/** A field for a picture or clip, which is chosen, dropped or pasted. */
function fileField(name, schema) {
  const isPicture = schema.contentMediaType === 'image/*';
  const what = isPicture ? 'picture' : 'clip';
  let file = null;
  let url = '';
  const input = make('input', {
    type: 'file', class: 'drop-input', accept: isPicture ? 'image/png,image/jpeg,image/webp' : 'video/*,image/gif,image/webp',
    id: `control-${name}`, 'aria-describedby': `control-${name}-hint`,
    on: { change: () => { if (input.files[0]) take(input.files[0]); input.value = ''; } },
  });
  const view = make(isPicture ? 'img' : 'video', { class: 'drop-view', alt: '', muted: true, hidden: true });
  const said = make('span', { class: 'drop-said' });
  const drop = make('label', { class: 'drop', for: input.id }, view, said);
  const clear = make('button', { type: 'button', class: 'link', textContent: 'Remove', on: { click: () => take(null) } });
  const element = make('div', { class: 'field', role: 'group', 'aria-labelledby': `${name}-title`, dataset: { field: name } },
    make('div', { class: 'head' }, make('span', { class: 'title', id: `${name}-title` }, titled(name)), clear),
    make('p', { class: 'hint', id: `control-${name}-hint` }, schema.description ?? ''), input, drop);

  function take(given) {
    if (given && !given.type.startsWith(isPicture ? 'image/' : 'video/') && !(!isPicture && given.type.startsWith('image/')))
      return complain(`${titled(name)}: ${given.name || 'this'} is not a ${what}.`);
    file = given;
    if (url) URL.revokeObjectURL(url);
    url = file ? URL.createObjectURL(file) : '';
    view.hidden = !file;
    clear.hidden = !file;
    if (file) view.src = url;
    else view.removeAttribute('src');
    said.textContent = file ? file.name || `the previous ${what}` : `Drop a ${what} here, or choose one`;
    return undefined;
  }

  drop.addEventListener('dragover', (event) => { event.preventDefault(); drop.classList.add('is-over'); });
  drop.addEventListener('dragleave', () => drop.classList.remove('is-over'));
  drop.addEventListener('drop', (event) => {
    event.preventDefault();
    drop.classList.remove('is-over');
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
  input.addEventListener('focus', () => drop.classList.toggle('is-focused', input.matches(':focus-visible')));
  input.addEventListener('blur', () => drop.classList.remove('is-focused'));
  take(null);
  return {
    element, isFile: true, isPicture, take,
    fill: () => take(null),
    value: () => new Promise((done, failed) => {
      if (!file) return void done(undefined);
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => failed(new Error(`${titled(name)}: the file cannot be read.`));
      return reader.readAsDataURL(file);
    }),
  };
}

/** The field for a control, from its schema. */
export function fieldOf(name, schema, frames) {
  const kind = schema['x-kind'];
  if (kind === 'curve') return curveField(name, schema, frames);
  if (kind === 'number' || kind === 'whole') return numberField(name, schema);
  if (kind === 'choice') return choiceField(name, schema);
  return kind === 'text' ? textField(name, schema) : fileField(name, schema);
}
