// The server's HTTP API: JSON in, JSON or a stream of events out. Knows nothing of the page.

let apiKey = "";

/** Rejects a key that no header can carry. */
export function setApiKey(key) {
  if (/[^\u0001-\u00ff]/.test(key)) {
    throw new Error("an API key cannot hold characters outside Latin-1: no header carries them");
  }
  apiKey = key;
}

export const hasApiKey = () => apiKey !== "";

/** What the server said when it refused: `status`, `code`, and the request's field in `param`. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered with status ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
    this.param = error?.param ?? null;
  }
}

async function send(path, options) {
  const headers = { ...options?.headers };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message: "the server cannot be reached" });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error);
}

function post(path, body, signal) {
  return send(path, { method: "POST", headers: { "Content-Type": "application/json" }, body, signal });
}

/** The model that is served: `id` and `max_model_len`. */
export async function getModel() {
  const response = await send("v1/models");
  return (await response.json()).data[0];
}

/** Which frames a request would look at, and what they cost. `body` is a Blob of JSON. */
export async function planMedia(body, signal) {
  return (await post("v1/media/plan", body, signal)).json();
}

/** Those frames as small pictures. */
export async function showFrames(body, signal) {
  return (await post("v1/media/frames", body, signal)).json();
}

/** Chunks of an answer as they come; `onAccepted` is called once, when the server has the prompt ready. */
export async function* streamChat(body, signal, onAccepted) {
  const response = await post("v1/chat/completions", body, signal);
  onAccepted();
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(response.status, chunk.error);
    yield chunk;
  }
  throw new ApiError(response.status, { message: "the connection ended before the answer did" });
}

/** Data of server-sent events; comments, which keep the connection open, are left out. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      waiting += value;
      const whole = waiting.split("\n\n");
      waiting = whole.pop();
      for (const event of whole) {
        if (event.startsWith("data: ")) yield event.slice("data: ".length);
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined); // it may have failed already, which was told above
  }
}
