// The chosen video, large: previews while it is made, then the clip. Below it, its request and buttons for actions.

import * as api from './api.js';
import { byId, complain, isCalm, make, save, short, titled } from './dom.js';
import { sparkline } from './curve.js';
import { Strip } from './strip.js';

const FORMATS = { mp4: 'MP4', webm: 'WebM', gif: 'GIF', webp: 'WebP' };
const WORDS = { sending: 'Sending…', queued: 'Waiting for its turn', in_progress: 'Beginning' };

/** The state of a job, in words. */
export function stateOf(job) {
  if (job.status === 'failed') return job.error?.code === 'cancelled' ? 'Cancelled' : job.error?.message || 'Failed';
  const place = job.place;
  if (job.status !== 'in_progress' || !place) return WORDS[job.status] ?? '';
  if (place.loop === 'decode') return `Decoding, frame ${place.step} of ${place.total}`;
  return `${titled(place.loop)}, step ${place.step} of ${place.total}`;
}

function facts(job) {
  const rows = [
    ['Seed', String(job.seed)], ['Length', `${job.num_frames} frames, ${Number((job.num_frames / job.fps).toFixed(2))} s`],
    ['Size', job.size.replace('x', ' × ')], ['Model', job.model],
  ];
  const many = (value) => [value].flat(2).map(short).join(', ');
  if (job.num_inference_steps) rows.push(['Steps', many(job.num_inference_steps)]);
  if (job.guidance_scale !== undefined && job.guidance_scale !== null) rows.push(['Guidance', many(job.guidance_scale)]);
  if (job.solver) rows.push(['Solver', many(job.solver)]);
  if (job.preset ?? job.metadata?.preset) rows.push(['Preset', job.preset ?? job.metadata.preset]);
  if (job.negative_prompt) rows.push(['Without', job.negative_prompt]);
  for (const [name, value] of Object.entries(job.controls ?? {})) {
    if (Array.isArray(value) && value.length > 1 && value.every((one) => typeof one === 'number')) rows.push([titled(name), sparkline(value)]);
    else if (Array.isArray(value) && Array.isArray(value[0])) rows.push([titled(name), 'a matrix']);
    else rows.push([titled(name), typeof value === 'string' ? value : short(value)]);
  }
  for (const name of job.files ?? []) rows.push([titled(name), 'a file']);
  return rows.flatMap(([name, value]) => [make('dt', {}, name), make('dd', {}, value)]);
}

/** The stage. `actions`: again(job), drop(job), stop(job). */
export function buildStage(root, sizes, actions) {
  const canvas = make('canvas', { class: 'screen-view', hidden: true, role: 'img', 'aria-label': 'Preview' });
  const video = make('video', { class: 'screen-view', loop: true, muted: true, playsInline: true, controls: true, hidden: true });
  const said = make('p', { class: 'screen-said' }); // the job's state, below the picture
  const word = make('p', { class: 'screen-word' }); // in place of a picture
  const bar = make('progress', { class: 'screen-bar', max: 100, value: 0, 'aria-label': 'Progress' });
  const screen = make('div', { class: 'screen' }, canvas, video, word, said, bar);
  const ratio = Math.min(16 / 9, Math.max(1, sizes.width / sizes.height));
  screen.style.aspectRatio = String(ratio);
  const state = make('p', { class: 'quiet' });
  const prompt = make('h2', { class: 'stage-prompt' });
  const list = make('dl', { class: 'facts' });
  const warned = make('p', { class: 'hint' });
  const count = make('summary');
  const notes = make('details', { class: 'notes' }, count, warned);
  const button = (text, act, kind = 'plain') => make('button', { type: 'button', class: kind, textContent: text, on: { click: act } });
  const again = button('Again with changes', () => actions.again(job), 'second');
  const format = make('select', { 'aria-label': 'Format' }, ...Object.entries(FORMATS).map(([value, textContent]) => make('option', { value, textContent })));
  const download = button('Download', () => fetchFile({ format: format.value }, format.value));
  const sheet = button('Contact sheet', showSheet);
  const remove = button('Delete', removed);
  const bottom = make('div', { class: 'actions' }, again, make('span', { class: 'joined' }, download, format), sheet, remove);
  root.replaceChildren(screen, make('div', { class: 'stage-text' }, make('div', { class: 'state' }, state, notes), prompt, bottom, list));
  const strip = new Strip(canvas);
  const suffix = video.canPlayType('video/mp4; codecs="avc1.42E01E"') ? 'mp4' : 'webm';
  let job = null;
  let url = '';
  let turn = 0;
  let sure = 0;

  video.addEventListener('loadeddata', () => { video.hidden = false; strip.stop(); });
  video.addEventListener('error', () => { if (url) word.textContent = 'This browser cannot play the clip: download it.'; });

  async function busy(control, act) {
    control.disabled = true;
    try {
      await act();
    } catch (error) {
      complain(error.message);
    } finally {
      control.disabled = job?.status !== 'completed';
    }
  }

  function fetchFile(wanted, end) {
    const { id } = job;
    return busy(download, async () => save(await api.content(id, wanted), `${id}.${end}`));
  }

  function showSheet() {
    const { id } = job;
    return busy(sheet, async () => {
      const blob = await api.content(id, { variant: 'spritesheet' });
      const image = byId('sheet-image');
      URL.revokeObjectURL(image.src);
      image.src = URL.createObjectURL(blob);
      image.alt = `Frames of: ${job.prompt}`;
      byId('sheet-save').onclick = () => save(blob, `${id}.jpg`);
      await image.decode();
      byId('sheet').showModal();
    });
  }

  /** Cancel a running job at once. Delete an ended job only after a second click. */
  function removed() {
    if (!api.hasEnded(job)) return actions.stop(job);
    if (!sure) {
      remove.textContent = 'Really delete?';
      sure = setTimeout(unsure, 4000);
      return undefined;
    }
    unsure();
    return actions.drop(job);
  }

  function unsure() {
    clearTimeout(sure);
    sure = 0;
    remove.textContent = job && !api.hasEnded(job) ? 'Cancel' : 'Delete';
  }

  async function play() {
    const mine = turn;
    try {
      const blob = await api.content(job.id, { format: suffix });
      if (mine !== turn) return;
      url = URL.createObjectURL(blob);
      video.src = url;
      if (!isCalm()) await video.play().catch(() => {});
    } catch (error) {
      if (mine === turn) word.textContent = error.message;
    }
  }

  function forget() {
    turn += 1;
    strip.stop();
    if (url) URL.revokeObjectURL(url);
    url = '';
    video.removeAttribute('src');
    video.load();
    video.hidden = true;
  }

  /** Show a job, or the changes of the shown one; null: show no job. */
  function show(next) {
    const isOther = next !== job;
    job = next;
    if (isOther) forget();
    root.classList.toggle('is-empty', !job);
    bottom.inert = !job;
    if (!job) {
      word.textContent = 'Your video appears here';
      said.textContent = '';
      state.textContent = prompt.textContent = '';
      notes.hidden = true;
      list.replaceChildren();
      bar.value = 0;
      return;
    }
    const isDone = job.status === 'completed';
    const isOver = job.status === 'failed';
    said.textContent = isDone || isOver ? '' : stateOf(job);
    if (isOther || isOver) word.textContent = isOver ? stateOf(job) : '';
    word.classList.toggle('is-error', isOver && job.error?.code !== 'cancelled');
    state.textContent = new Date(job.created_at * 1000).toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'short' });
    prompt.textContent = job.prompt || 'No prompt';
    prompt.title = job.prompt;
    list.replaceChildren(...facts(job));
    const warnings = job.metadata?.warnings ?? [];
    warned.textContent = warnings.join(' ');
    count.textContent = warnings.length === 1 ? '1 note' : `${warnings.length} notes`;
    notes.hidden = !warnings.length;
    if (isOther) notes.open = false;
    bar.value = isDone || isOver ? 0 : job.progress;
    root.classList.toggle('is-running', !api.hasEnded(job));
    for (const one of [download, sheet, format]) one.disabled = !isDone;
    again.disabled = remove.disabled = job.status === 'sending';
    unsure();
    if (isDone && !url && (isOther || !video.src)) { turn += 1; play(); }
    if (job.preview && !isDone && (isOther || job.isNew)) strip.show(job.preview, job.num_frames / job.fps);
    if (isOver) strip.stop();
    job.isNew = false;
  }

  show(null);
  return { show, current: () => job };
}
