// A preview: one picture with several frames side by side, which are played in turn.

import { isCalm } from './dom.js';

/** Plays the frames of a preview on a canvas until the next preview is shown or `stop` is called. */
export class Strip {
  constructor(canvas) {
    this.canvas = canvas;
    this.timer = 0;
    this.frame = 0;
    this.turn = 0;
  }

  async show(preview, seconds) {
    this.turn += 1;
    const { turn, canvas } = this;
    const picture = new Image();
    picture.src = preview.image;
    try {
      await picture.decode();
    } catch {
      return;
    }
    if (turn !== this.turn) return;
    clearInterval(this.timer);
    const { width, height, frames } = preview;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const paint = () => {
      this.frame %= frames;
      canvas.getContext('2d').drawImage(picture, this.frame * width, 0, width, height, 0, 0, width, height);
    };
    if (isCalm()) this.frame = Math.floor(frames / 2);
    paint();
    canvas.hidden = false;
    if (frames > 1 && !isCalm())
      this.timer = setInterval(() => { this.frame += 1; paint(); }, Math.max(60, (1000 * seconds) / frames));
  }

  stop() {
    this.turn += 1;
    clearInterval(this.timer);
    this.canvas.hidden = true;
  }
}
