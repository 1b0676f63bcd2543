// The prompt's field. It suggests words that the model knows, and lists typed words that the model does not know.

import { make } from './dom.js';

const MOST = 12;
const WORD = /[\p{L}\p{N}'’-]+/gu;
const wordsOf = (text) => (text.toLowerCase().match(WORD) ?? []);

/** Suggests the next word: first words that follow the previous word in example prompts, then the model's words. */
class Vocabulary {
  constructor(model) {
    this.known = model.words ? new Set(model.words) : null;
    this.examples = model.prompts;
    this.next = new Map();
    const counts = new Map();
    for (const prompt of model.prompts) {
      let before = '';
      for (const word of wordsOf(prompt)) {
        counts.set(word, (counts.get(word) ?? 0) + 1);
        const after = this.next.get(before) ?? new Map();
        this.next.set(before, after.set(word, (after.get(word) ?? 0) + 1));
        before = word;
      }
    }
    this.words = [...new Set([...counts.keys(), ...(model.words ?? [])])]
      .sort((a, b) => (counts.get(b) ?? 0) - (counts.get(a) ?? 0));
  }

  suggest(text) {
    const words = wordsOf(text);
    if (!words.length) return [];
    const begun = /[\p{L}\p{N}'’-]$/u.test(text) ? words.pop() : '';
    const after = [...(this.next.get(words.at(-1) ?? '') ?? new Map())].sort((a, b) => b[1] - a[1]).map(([word]) => word);
    const fits = (word) => word.startsWith(begun) && word !== begun;
    return [...new Set([...after, ...(begun ? this.words : [])])].filter(fits).slice(0, MOST);
  }

  unknown(text, isTyping) {
    if (!this.known) return [];
    const words = wordsOf(text);
    if (isTyping && /[\p{L}\p{N}'’-]$/u.test(text)) words.pop();
    return [...new Set(words)].filter((word) => !this.known.has(word) && !word.split(/['’-]/).every((w) => this.known.has(w)));
  }
}

/** The field for the prompt. `submit` is called on Enter. */
export function promptField(model, submit) {
  const vocabulary = new Vocabulary(model);
  const area = make('textarea', {
    id: 'prompt', name: 'prompt', rows: 3, maxLength: 100000, spellcheck: !model.words,
    autocapitalize: 'none', enterKeyHint: 'go', placeholder: model.prompts[0] ?? 'What the video shows',
    'aria-describedby': 'prompt-words',
  });
  const row = make('div', { class: 'offers', role: 'group', 'aria-label': 'Words that fit' });
  const said = make('p', { class: 'hint said-words', id: 'prompt-words', role: 'status' });
  const element = make('div', { class: 'field prompt', dataset: { field: 'prompt' } },
    make('label', { for: 'prompt' }, 'Prompt'), area, row, said);
  const examples = [...vocabulary.examples].sort(() => Math.random() - 0.5).slice(0, 4);

  function chip(text, act) {
    return make('button', { type: 'button', class: 'chip', textContent: text, on: { click: act } });
  }

  function complete(word) {
    const begun = /[\p{L}\p{N}'’-]$/u.test(area.value);
    const head = begun ? area.value.replace(/[\p{L}\p{N}'’-]+$/u, '') : area.value.replace(/([^\s])$/u, '$1 ');
    write(`${head}${word} `);
  }

  function write(text) {
    area.value = text;
    area.focus();
    area.setSelectionRange(text.length, text.length);
    area.dispatchEvent(new Event('input', { bubbles: true }));
  }

  function show() {
    const offers = area.value.trim()
      ? vocabulary.suggest(area.value).map((word) => chip(word, () => complete(word)))
      : examples.map((text) => chip(text, () => write(text)));
    row.replaceChildren(...offers);
    row.scrollLeft = 0;
    name();
  }

  /** List the words that the model does not know, except the word that is being typed. */
  function name() {
    const unknown = vocabulary.unknown(area.value, document.activeElement === area);
    const named = unknown.slice(0, 4).map((word) => `“${word.slice(0, 24)}”`).join(', ');
    said.textContent = unknown.length ? `The model does not know ${named}${unknown.length > 4 ? ', …' : ''}.` : '';
    area.toggleAttribute('data-unknown', unknown.length > 0);
  }

  area.addEventListener('input', show);
  area.addEventListener('blur', name);
  area.addEventListener('keydown', (event) => {
    if (event.isComposing) return;
    if (event.key === 'Enter' && !event.shiftKey) {
      event.preventDefault();
      submit();
    }
    const isAtEnd = area.selectionStart === area.value.length;
    if (event.key === 'ArrowDown' && isAtEnd && row.firstChild) {
      event.preventDefault();
      row.firstChild.focus();
    }
  });
  row.addEventListener('keydown', (event) => {
    const move = { ArrowRight: 'nextSibling', ArrowLeft: 'previousSibling' }[event.key];
    if (move) document.activeElement[move]?.focus();
    if (event.key === 'ArrowUp' || event.key === 'Escape') area.focus();
    if (move || event.key === 'ArrowUp') event.preventDefault();
  });
  show();
  return {
    element,
    value: () => area.value,
    focus: () => area.focus(),
    fill(text) { area.value = text; show(); },
  };
}
