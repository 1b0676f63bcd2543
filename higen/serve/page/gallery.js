// The list of videos as cards, the newest first.

import * as api from './api.js';
import { byId, make } from './dom.js';
import { stateOf } from './stage.js';
import { Strip } from './strip.js';

/** The list of cards. `choose(job)` is called when a card is clicked. */
export class Gallery {
  constructor(choose) {
    this.choose = choose;
    this.cards = new Map();
    this.list = byId('cards');
    this.list.replaceChildren();
    this.seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting) continue;
        this.seen.unobserve(entry.target);
        this.load(entry.target);
      }
    }, { rootMargin: '300px' });
    this.empty();
  }

  empty() {
    byId('none').hidden = this.cards.size > 0;
  }

  add(job, isFirst) {
    const image = make('img', { alt: '', hidden: true, decoding: 'async' });
    const canvas = make('canvas', { hidden: true });
    const said = make('span', { class: 'card-said' });
    const seed = make('span', { class: 'card-seed' });
    const bar = make('span', { class: 'card-bar', 'aria-hidden': 'true' });
    const button = make('button', { type: 'button', class: 'card', on: { click: () => this.choose(job) } },
      make('span', { class: 'card-view' }, image, canvas, said, bar),
      make('span', { class: 'card-prompt' }, job.prompt || 'No prompt'), seed);
    const item = make('li', {}, button);
    const card = { item, button, image, said, seed, bar, strip: new Strip(canvas), job };
    button.card = card;
    this.cards.set(job, card);
    if (isFirst) this.list.prepend(item);
    else this.list.append(item);
    this.show(job);
    this.empty();
  }

  show(job) {
    const card = this.cards.get(job);
    if (!card) return;
    card.seed.textContent = job.status === 'sending' ? '' : `seed ${job.seed}`;
    card.said.textContent = job.status === 'completed' ? '' : job.status === 'failed' ? (job.error?.code === 'cancelled' ? 'Cancelled' : 'Failed') : job.place ? '' : stateOf(job);
    card.bar.style.inlineSize = api.hasEnded(job) ? '0' : `${job.progress}%`;
    if (job.preview && job.isNew) card.strip.show(job.preview, job.num_frames / job.fps);
    if (job.status === 'failed') card.strip.stop();
    if (job.status === 'completed' && card.image.hidden) this.seen.observe(card.button);
  }

  /** Load a card's thumbnail when the card comes into view. */
  async load({ card }) {
    try {
      const url = URL.createObjectURL(await api.content(card.job.id, { variant: 'thumbnail' }));
      card.image.src = url;
      await card.image.decode();
      URL.revokeObjectURL(url);
      card.image.hidden = false;
      card.strip.stop();
    } catch (error) {
      card.said.textContent = error.status === 410 ? 'Expired' : 'No picture';
    }
  }

  mark(job) {
    for (const [one, card] of this.cards) card.button.setAttribute('aria-pressed', String(one === job));
  }

  remove(job) {
    const card = this.cards.get(job);
    card?.strip.stop();
    card?.item.remove();
    this.cards.delete(job);
    this.empty();
  }
}
