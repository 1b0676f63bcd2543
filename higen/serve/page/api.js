// Calls the server: sends requests with the key, turns refusals into errors, and reads a job's events.

const PLACE = 'higen-key';

export const key = {
  get: () => sessionStorage.getItem(PLACE) ?? '',
  set: (value) => (value ? sessionStorage.setItem(PLACE, value) : sessionStorage.removeItem(PLACE)),
};

/** A request that was refused: HTTP `status` (0: no answer), and the server's `code` and `param`. */
export class Refused extends Error {
  constructor(message, status, code = '', param = null) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

/** Parse JSON; a seed beyond 2^53 becomes a string, so that it stays exact. */
function parse(text) {
  return JSON.parse(text, (name, value, context) =>
    name === 'seed' && typeof value === 'number' && !Number.isSafeInteger(value) ? (context?.source ?? value) : value);
}

/** The JSON of a request. The digits of a seed are copied, so that it stays exact. */
export function encode({ seed, ...fields }) {
  const text = JSON.stringify(fields);
  if (seed === undefined) return text;
  return `${text.slice(0, -1)}${text === '{}' ? '' : ','}"seed":${/^-?\d+$/.test(seed) ? seed : JSON.stringify(seed)}}`;
}

async function send(path, { method = 'GET', body, headers = {}, signal } = {}) {
  const given = { ...headers };
  if (key.get()) given.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) given['content-type'] = 'application/json';
  let answer;
  try {
    answer = await fetch(path, { method, body, headers: given, signal, cache: 'no-store', redirect: 'error' });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused('The server does not answer. Is it running, and is the file not too large?', 0);
  }
  if (answer.ok) return answer;
  let said = {};
  try {
    said = (await answer.json()).error ?? {};
  } catch { /* not JSON: an error page of a proxy */ }
  throw new Refused(said.message ?? `The server answered with ${answer.status}`, answer.status, said.code, said.param);
}

const json = async (path, options) => parse(await (await send(path, options)).text());

export const models = async () => (await json('/v1/models')).data;
export const page = (after) => json(`/v1/videos?limit=24${after ? `&after=${encodeURIComponent(after)}` : ''}`);
export const create = (fields) => json('/v1/videos', { method: 'POST', body: encode(fields) });
export const retrieve = (id) => json(`/v1/videos/${id}`);
export const cancel = (id) => json(`/v1/videos/${id}/cancel`, { method: 'POST' });
export const remove = (id) => json(`/v1/videos/${id}`, { method: 'DELETE' });
export const sentFile = async (id, control) =>
  (await send(`/v1/videos/${id}/files/${encodeURIComponent(control)}`)).blob();

/** A finished video's file. `wanted`: {format} or {variant}. */
export const content = async (id, wanted) =>
  (await send(`/v1/videos/${id}/content?${new URLSearchParams(wanted)}`)).blob();

export const hasEnded = (job) => job.status === 'completed' || job.status === 'failed';

const pause = (time, signal) => new Promise((done) => {
  setTimeout(done, time);
  signal.addEventListener('abort', done, { once: true });
});

async function* blocks(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split('\n\n');
    text = parts.pop();
    for (const part of parts) {
      const lines = part.split('\n').map((line) => [line.slice(0, line.indexOf(':')), line.slice(line.indexOf(':') + 2)]);
      const block = Object.fromEntries(lines);
      if (block.event) yield { id: block.id, name: block.event, data: parse(block.data) };
    }
  }
}

/** Call `on(name, data)` for each event of a job until it ends. Returns the job; null if it was deleted. */
export async function follow(id, on, signal) {
  let last = '';
  for (let tries = 0; !signal.aborted; tries += 1) {
    try {
      const headers = last ? { 'last-event-id': last } : {};
      const answer = await send(`/v1/videos/${id}/events`, { headers, signal });
      for await (const event of blocks(answer.body)) {
        tries = 0;
        last = event.id ?? last;
        if (event.name !== 'done') on(event.name, event.data);
        else return event.data.status === 'deleted' ? null : event.data;
      }
    } catch (error) {
      if (signal.aborted) return null;
      if (error.status === 401) throw error;
    }
    await pause(Math.min(500 * 2 ** tries, 8000), signal); // the stream broke or was refused: poll once
    if (signal.aborted) return null;
    try {
      const job = await retrieve(id);
      if (hasEnded(job)) return job;
      on('progress', job);
    } catch (error) {
      if (error.status === 404) return null;
      if (error.status === 401) throw error;
    }
  }
  return null;
}
