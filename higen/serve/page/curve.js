// The editor for a control with one value per frame. It works with a mouse, a finger or the arrow keys.

import { draw, make, short, titled } from './dom.js';

const WIDE = 300;
const HIGH = 100;
const TOPS = { sinusoid: 500, similarity: 1, curve: 1 };
const LEFT_OUT = 'unspecified';
const SHAPES = {
  Flat: () => 0.5,
  Rise: (t) => 0.1 + 0.8 * t,
  Fall: (t) => 0.9 - 0.8 * t,
  Wave: (t) => 0.5 - 0.4 * Math.cos(2 * Math.PI * t),
};

/** Round up to 1, 2 or 5 times a power of ten. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((one) => one * power).find((one) => one >= value * (1 - 1e-9));
}

function resampled(values, count) {
  if (values.length === count) return values;
  return Array.from({ length: count }, (_, i) => {
    const place = count === 1 ? 0 : (i * (values.length - 1)) / (count - 1);
    const low = Math.floor(place);
    const high = Math.min(low + 1, values.length - 1);
    return values[low] + (values[high] - values[low]) * (place - low);
  });
}

function rangeOf(schema) {
  const number = (schema.anyOf ?? []).find((one) => one.type === 'number' || one.type === 'integer') ?? {};
  const plain = typeof schema.default === 'number' ? schema.default : 0;
  const low = number.minimum ?? Math.min(0, -roundUp(Math.abs(Math.min(plain, 0)) || 1e-9));
  const most = number.maximum ?? Infinity;
  const usual = plain > 0 && plain < most / 20 ? roundUp(5 * plain) : most; // a wide range first shows its low part
  const free = Math.max(TOPS[schema['x-encoding']] ?? 1, plain > 0 ? roundUp(2 * plain) : 0);
  return { low: Math.abs(low) < 1e-6 ? 0 : low, top: most === Infinity ? free : usual, most, least: number.minimum ?? -Infinity };
}

/** The editor for a curve. `value()`: undefined (the model's default), one number, or one number per frame. */
export function curveField(name, schema, frames) {
  const range = rangeOf(schema);
  const isOptional = schema.default === null;
  const initial = isOptional ? (range.low + range.top) / 2 : schema.default;
  let values = Array(frames).fill(initial);
  let isSet = false;
  let fixed = null; // a value that is not a curve: 'unspecified', or a matrix of similarities from an older request
  let cursor = 0;
  let pen = null;

  const area = draw('path', { class: 'curve-area' });
  const line = draw('path', { class: 'curve-line' });
  const dot = draw('circle', { class: 'curve-dot', r: 4.5 });
  const rules = [0, 0.25, 0.5, 0.75, 1].map((part) =>
    draw('line', { class: 'curve-rule', x1: 0, x2: WIDE, y1: part * HIGH, y2: part * HIGH }));
  const plane = draw('svg', { viewBox: `0 0 ${WIDE} ${HIGH}`, preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    ...rules, area, line);
  const marks = draw('svg', { class: 'curve-marks', 'aria-hidden': 'true' }, dot);
  const readout = make('span', { class: 'curve-readout' });
  const ghost = make('span', { class: 'curve-ghost', textContent: 'Draw a curve here' });
  const upper = make('span', { class: 'curve-upper' });
  const lower = make('span', { class: 'curve-lower' });
  const plot = make('div', {
    class: 'curve-plot', role: 'slider', tabIndex: 0, 'aria-label': `${titled(name)}, frame by frame`,
    'aria-describedby': `${name}-hint`,
  }, plane, marks, upper, lower, ghost, readout);
  const state = make('span', { class: 'quiet' });
  const reset = make('button', { type: 'button', class: 'link', textContent: 'Reset', on: { click: clear } });
  const level = make('input', {
    id: `${name}-level`, type: 'number', step: 'any', on: { input: () => level.value !== '' && setAll(Number(level.value)) },
  });
  const top = make('input', {
    id: `${name}-top`, type: 'number', step: 'any', value: String(range.top),
    on: { change: () => rescale(Number(top.value)) },
  });
  const shapes = Object.entries(SHAPES).map(([title, shape]) =>
    make('button', { type: 'button', class: 'chip', textContent: title, on: { click: () => shaped(shape) } }));
  if (!isOptional && (schema.anyOf ?? []).some((one) => one.const === LEFT_OUT))
    shapes.push(make('button', { type: 'button', class: 'chip', textContent: 'Leave out', on: { click: leaveOut } }));
  const element = make('div', { class: 'field curve', role: 'group', 'aria-labelledby': `${name}-title`, dataset: { field: name } },
    make('div', { class: 'head' }, make('span', { class: 'title', id: `${name}-title` }, titled(name)), state, reset),
    make('p', { class: 'hint', id: `${name}-hint` }, schema.description ?? ''),
    plot,
    make('div', { class: 'curve-tools' },
      make('span', { class: 'chips' }, ...shapes),
      make('span', { class: 'curve-numbers' },
        make('label', { for: level.id }, 'All frames'), level,
        make('label', { for: top.id }, 'Scale to'), top)));

  const clamp = (value) => Math.min(range.top, Math.max(range.low, value));
  const step = () => (range.top - range.low) / 100;
  const rounded = (value) => Number(clamp(Math.round(value / step()) * step()).toPrecision(6));
  const x = (i) => (values.length === 1 ? WIDE / 2 : (i * WIDE) / (values.length - 1));
  const y = (value) => HIGH - ((clamp(value) - range.low) / (range.top - range.low || 1)) * HIGH;

  function show() {
    const points = values.map((value, i) => `${x(i).toFixed(2)} ${y(value).toFixed(2)}`);
    const path = values.length === 1 ? `M0 ${y(values[0])}L${WIDE} ${y(values[0])}` : `M${points.join('L')}`;
    line.setAttribute('d', path);
    area.setAttribute('d', `${path}L${WIDE} ${HIGH}L0 ${HIGH}Z`);
    dot.setAttribute('cx', `${(x(cursor) / WIDE) * 100}%`);
    dot.setAttribute('cy', `${(y(values[cursor]) / HIGH) * 100}%`);
    upper.textContent = short(range.top);
    lower.textContent = short(range.low);
    const here = `frame ${cursor + 1} of ${values.length}: ${short(values[cursor])}`;
    readout.textContent = isSet && !fixed ? here : '';
    state.textContent = fixed ? (fixed === LEFT_OUT ? 'left out' : 'a matrix') : isSet ? '' : isOptional ? 'the model’s choice' : 'the model’s default';
    reset.hidden = !isSet;
    ghost.hidden = isSet || !isOptional;
    line.style.display = ghost.hidden && !fixed ? '' : 'none';
    area.style.display = line.style.display;
    element.classList.toggle('is-set', isSet);
    plot.setAttribute('aria-valuemin', range.low);
    plot.setAttribute('aria-valuemax', range.top);
    plot.setAttribute('aria-valuenow', short(values[cursor]));
    plot.setAttribute('aria-valuetext', isSet ? here : `${state.textContent}; ${here}`);
    const isFlat = values.every((value) => value === values[0]);
    if (document.activeElement !== level) level.value = isSet && isFlat ? short(values[0]) : '';
  }

  function changed() {
    isSet = true;
    fixed = null;
    show();
    element.dispatchEvent(new Event('input', { bubbles: true }));
  }

  function clear() {
    isSet = false;
    fixed = null;
    values = Array(values.length).fill(initial);
    show();
  }

  function leaveOut() {
    changed();
    fixed = LEFT_OUT;
    show();
  }

  function rescale(wanted) {
    if (Number.isFinite(wanted) && wanted > range.low) range.top = Math.min(wanted, range.most);
    top.value = String(range.top);
    values = values.map(clamp);
    show();
  }

  function setAll(value) {
    if (!Number.isFinite(value)) return;
    fit(value);
    values = Array(values.length).fill(value);
    changed();
  }

  /** Extend the scale to include a value, up to the model's limit. */
  function fit(value) {
    if (value > range.top) range.top = Math.min(range.most, roundUp(value));
    if (value < range.low && value < 0) range.low = Math.max(range.least, -roundUp(-value));
    top.value = String(range.top);
  }

  function shaped(shape) {
    const last = Math.max(1, values.length - 1);
    values = values.map((_, i) => rounded(range.low + shape(i / last) * (range.top - range.low)));
    changed();
  }

  function placed(event) {
    const box = plane.getBoundingClientRect();
    const across = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const up = 1 - Math.min(1, Math.max(0, (event.clientY - box.top) / box.height));
    return { index: Math.round(across * (values.length - 1)), value: rounded(range.low + up * (range.top - range.low)) };
  }

  /** Set the frames between the pen's last position and this one. */
  function paint(event) {
    const to = placed(event);
    const from = pen ?? to;
    const count = Math.abs(to.index - from.index);
    for (let i = 0; i <= count; i += 1) {
      const part = count ? i / count : 1;
      values[from.index + Math.sign(to.index - from.index) * i] = rounded(from.value + (to.value - from.value) * part);
    }
    pen = to;
    cursor = to.index;
    changed();
  }

  plot.addEventListener('pointerdown', (event) => {
    if (event.button !== 0) return;
    plot.setPointerCapture(event.pointerId);
    plot.focus({ preventScroll: true });
    pen = null;
    paint(event);
    event.preventDefault();
  });
  plot.addEventListener('pointermove', (event) => {
    if (pen) for (const one of event.getCoalescedEvents?.() ?? [event]) paint(one);
  });
  for (const kind of ['pointerup', 'pointercancel']) plot.addEventListener(kind, () => { pen = null; });
  plot.addEventListener('keydown', (event) => {
    const up = { ArrowUp: 1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
    const right = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (up === undefined && right === undefined && event.key !== 'Delete') return;
    event.preventDefault();
    if (event.key === 'Delete') return void clear();
    if (up !== undefined) {
      values[cursor] = rounded(values[cursor] + up * (event.shiftKey ? 10 : 1) * step());
      return void changed();
    }
    cursor = Math.min(values.length - 1, Math.max(0, cursor + right));
    show();
  });
  show();

  return {
    element,
    value() {
      if (fixed) return fixed;
      if (!isSet) return undefined;
      return values.every((value) => value === values[0]) ? values[0] : values;
    },
    fill(given) {
      if (given === undefined || given === null || (isOptional && given === LEFT_OUT)) return clear();
      fixed = given === LEFT_OUT || (Array.isArray(given) && Array.isArray(given[0])) ? given : null;
      const flat = fixed ? [initial] : [given].flat().map(Number);
      if (!flat.length || !flat.every(Number.isFinite)) return clear();
      flat.forEach(fit);
      values = resampled(flat, values.length);
      isSet = true;
      return show();
    },
    frames(count) {
      if (!Number.isInteger(count) || count < 1 || count > 65536) return;
      values = resampled(values, count).map((value) => Number(value.toPrecision(6)));
      cursor = Math.min(cursor, count - 1);
      show();
    },
  };
}

/** A small picture of a curve, for the list of a video's settings. */
export function sparkline(values) {
  const low = Math.min(0, ...values);
  const span = Math.max(...values) - low || 1;
  const points = values.map((value, i) => `${(i * 60) / Math.max(1, values.length - 1)},${15 - ((value - low) / span) * 14}`);
  return draw('svg', { class: 'sparkline', viewBox: '0 0 60 16', role: 'img',
    'aria-label': `a curve from ${short(values[0])} to ${short(values.at(-1))}` }, draw('polyline', { points: points.join(' ') }));
}
