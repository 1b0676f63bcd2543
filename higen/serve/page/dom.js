// Makes elements without markup, so that data from outside is always text.

const SVG = 'http://www.w3.org/2000/svg';

/** An element with properties (`class`, `dataset`, `on` and ARIA among them) and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === 'on') for (const [kind, act] of Object.entries(value)) element.addEventListener(kind, act);
    else if (name === 'dataset') Object.assign(element.dataset, value);
    else if (name === 'class' || name === 'for' || name === 'role' || name === 'list' || name.startsWith('aria-'))
      element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** An SVG element with attributes. */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

/** A control's name as shown to users. */
export function titled(name) {
  const words = name.replaceAll('_', ' ');
  return words.charAt(0).toUpperCase() + words.slice(1);
}

/** A number with at most four significant digits if it is not whole; other values as text. */
export function short(number) {
  return typeof number === 'number' && !Number.isInteger(number) ? String(Number(number.toPrecision(4))) : String(number);
}

export const isCalm = () => matchMedia('(prefers-reduced-motion: reduce)').matches;

let closing = 0;

/** Show an error for 20 seconds, or until it is closed or replaced by another one. */
export function complain(text) {
  const toast = byId('toast');
  toast.querySelector('p').textContent = text;
  toast.hidden = false;
  clearTimeout(closing);
  closing = setTimeout(() => { toast.hidden = true; }, 20000);
}

export function calm() {
  byId('toast').hidden = true;
}

/** Announce a text to screen readers. */
export function tell(text) {
  byId('heard').textContent = text;
}

/** Offer a file as a download. */
export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  make('a', { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
