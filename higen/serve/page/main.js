// The page: a form, a stage, a gallery, and the jobs that they show.

import * as api from './api.js';
import { byId, calm, complain, isCalm, tell } from './dom.js';
import { buildForm } from './form.js';
import { Gallery } from './gallery.js';
import { buildStage } from './stage.js';

const STREAMS = 3; // a browser opens at most six connections to a server

let models = [];
let jobs = [];
let form = null;
let stage = null;
let gallery = null;
let watching = new AbortController();

function shown(id) {
  for (const one of ['waiting', 'locked', 'work']) byId(one).hidden = one !== id;
}

async function start() {
  try {
    models = await api.models();
    const page = await api.page();
    open(page);
  } catch (error) {
    if (error.status === 401) return lock(api.key.get() ? 'The server does not know this key.' : '');
    byId('waiting').textContent = error.message;
  }
  return undefined;
}

function lock(text) {
  watching.abort();
  api.key.set('');
  byId('forget').hidden = true;
  shown('locked');
  byId('key-said').textContent = text;
  byId('key').value = '';
  byId('key').focus();
}

function open(page) {
  watching = new AbortController();
  byId('forget').hidden = !api.key.get();
  jobs = [];
  stage = buildStage(byId('stage'), models[0].sizes, { again, drop, stop });
  gallery = new Gallery((job) => choose(job, true));
  use(models[0]);
  append(page);
  shown('work');
  choose(jobs[0] ?? null);
}

function use(model) {
  form = buildForm(byId('form'), models, model, {
    change: (name) => {
      use(models.find((one) => one.id === name));
      byId('model').focus();
    },
  });
}

function append(page) {
  for (const job of page.data) {
    if (jobs.some((one) => one.id === job.id)) continue;
    jobs.push(job);
    gallery.add(job, false);
    if (!api.hasEnded(job)) watch(job);
  }
  byId('more').hidden = !page.has_more;
}

function choose(job, isAsked = false) {
  stage.show(job);
  gallery.mark(job);
  const open = jobs.filter((one) => one.stream && one !== job);
  while (open.length > STREAMS) open.pop().stream.abort();
  if (!isAsked) return;
  const box = byId('stage').getBoundingClientRect();
  if (box.top < 0 || box.top > innerHeight / 2)
    byId('stage').scrollIntoView({ behavior: isCalm() ? 'auto' : 'smooth', block: 'start' });
}

function changed(job) {
  const isNew = job.isNew;
  gallery.show(job);
  job.isNew = isNew;
  if (stage.current() === job) stage.show(job);
  job.isNew = false;
}

/** Follow a job to its end. Its events are used if it is the chosen job or a stream is free; otherwise it is polled. */
async function watch(job) {
  const { signal } = watching;
  try {
    while (!signal.aborted) {
      let last;
      if (stage.current() === job || jobs.filter((one) => one.stream).length < STREAMS) {
        job.stream = new AbortController();
        const mine = job.stream.signal;
        last = await api.follow(job.id, (name, data) => happened(job, name, data), AbortSignal.any([signal, mine]));
        job.stream = null;
        if (mine.aborted) continue; // the chosen job took the stream
      } else {
        await new Promise((done) => { setTimeout(done, 1500); });
        if (!signal.aborted) last = await api.retrieve(job.id);
      }
      if (signal.aborted || !jobs.includes(job)) return;
      if (!last) return void forget(job);
      Object.assign(job, last);
      changed(job);
      if (api.hasEnded(job)) {
        tell(job.status === 'completed' ? `The video is ready: ${job.prompt}` : `The video was not made: ${job.error?.message}`);
        return;
      }
    }
  } catch (error) {
    job.stream = null;
    if (error.status === 401) lock('The server does not know this key any more.');
    else if (error.status === 404) forget(job);
    else if (error.status) complain(error.message);
    else setTimeout(() => { if (!signal.aborted && jobs.includes(job)) watch(job); }, 3000); // no answer: try again
  }
}

function happened(job, name, data) {
  if (name === 'preview') Object.assign(job, { preview: data, isNew: true });
  if (data.status) job.status = data.status;
  if (name === 'preview' || name === 'progress') {
    job.status = 'in_progress';
    job.progress = Math.max(job.progress, data.progress ?? 0);
    if (data.loop) job.place = { loop: data.loop, step: data.step, total: data.total };
  }
  changed(job);
}

function forget(job) {
  const place = jobs.indexOf(job);
  jobs = jobs.filter((one) => one !== job);
  gallery.remove(job);
  if (stage.current() === job) choose(jobs[Math.min(Math.max(place, 0), jobs.length - 1)] ?? null);
}

/** Send the form. The card is added at once, so that nothing moves when the answer comes. */
async function submit() {
  calm();
  const mine = form;
  const now = Math.floor(Date.now() / 1000);
  const prompt = byId('prompt').value;
  const { sizes } = mine.model;
  const job = {
    id: '', status: 'sending', progress: 0, prompt, model: mine.model.id, seed: '…', created_at: now, controls: {},
    files: [], num_frames: sizes.num_frames.default, fps: sizes.fps, size: `${sizes.width}x${sizes.height}`,
  };
  const before = stage.current();
  jobs.unshift(job);
  gallery.add(job, true);
  choose(job, true);
  try {
    const fields = await mine.read();
    const { seed: _, controls, ...asked } = fields;
    const isFile = (name) => mine.fields.get(name).isFile;
    const names = Object.keys(controls);
    Object.assign(job, asked, {
      controls: Object.fromEntries(names.filter((name) => !isFile(name)).map((name) => [name, controls[name]])),
      files: names.filter(isFile),
    });
    changed(job);
    Object.assign(job, await api.create(fields));
    tell('The video is asked for.');
    changed(job);
    watch(job);
  } catch (error) {
    forget(job);
    choose(before);
    if (error.status === 401) return lock('The server does not know this key any more.');
    complain(error.message);
    if (mine === form) form.mark(error.param);
  }
  return undefined;
}

async function stop(job) {
  try {
    Object.assign(job, await api.cancel(job.id));
    changed(job);
  } catch (error) {
    complain(error.message);
  }
}

async function drop(job) {
  const place = jobs.indexOf(job);
  forget(job);
  try {
    await api.remove(job.id);
  } catch (error) {
    if (error.status === 404) return;
    complain(error.message);
    jobs.splice(place, 0, job);
    gallery.add(job, place === 0);
  }
}

const HEADS = [[[0x89, 0x50], 'image/png'], [[0xff, 0xd8], 'image/jpeg'], [[0x47, 0x49], 'image/gif'], [[0x1a, 0x45], 'video/webm']];

/** Fill the form with the request of a video, including its files. */
async function again(job) {
  const model = models.find((one) => one.id === job.model);
  if (!model) return complain(`The model ${job.model} is not served any more.`);
  if (form.model !== model) use(model);
  const mine = form;
  const lost = form.fill(job);
  if (lost.length) complain(`This form has no place for: ${lost.join(', ')}.`);
  byId('form').scrollIntoView({ behavior: isCalm() ? 'auto' : 'smooth', block: 'start' });
  form.focus();
  for (const name of job.files ?? []) {
    try {
      const blob = await api.sentFile(job.id, name);
      const head = new Uint8Array(await blob.slice(0, 12).arrayBuffer());
      const isWebp = String.fromCharCode(...head.slice(8)) === 'WEBP';
      const kind = isWebp ? 'image/webp' : HEADS.find(([bytes]) => bytes.every((one, i) => head[i] === one))?.[1] ?? 'video/mp4';
      if (mine === form) mine.fields.get(name)?.take?.(new File([blob], '', { type: kind }));
    } catch (error) {
      complain(`${name}: ${error.message}`);
    }
  }
  return undefined;
}

byId('form').addEventListener('submit', (event) => { event.preventDefault(); submit(); });
byId('key-form').addEventListener('submit', (event) => {
  event.preventDefault();
  api.key.set(byId('key').value.trim());
  start();
});
byId('forget').addEventListener('click', () => lock(''));
byId('more').addEventListener('click', async (event) => {
  const button = event.currentTarget;
  button.disabled = true;
  try {
    append(await api.page(jobs.at(-1)?.id));
  } catch (error) {
    complain(error.message);
  } finally {
    button.disabled = false;
  }
});
byId('sheet-close').addEventListener('click', () => byId('sheet').close());
byId('sheet').addEventListener('click', (event) => { if (event.target === byId('sheet')) byId('sheet').close(); });
byId('toast').querySelector('button').addEventListener('click', calm);
// A file that is dropped outside a field must not replace the page.
for (const kind of ['dragover', 'drop']) addEventListener(kind, (event) => event.preventDefault());
addEventListener('paste', (event) => {
  const file = event.clipboardData?.files[0];
  const field = file && form && [...form.fields.values()].find((one) => one.isFile && one.isPicture === file.type.startsWith('image/'));
  if (!field) return;
  event.preventDefault();
  field.take(file);
});
start();
