// A conversation to the body of a chat request, and to programs that send it. Sends nothing itself.

// Stands for a file's data URL in a body until it is sent; nobody can have typed it.
const secret = [...crypto.getRandomValues(new Uint32Array(4))].map((part) => part.toString(16)).join("");
const marker = (item) => `upload-${secret}-${item.id}-`;

/** Content part of a video or an image; `url` is its address, or the marker of an upload. */
function mediaPart(item) {
  const field = `${item.kind}_url`;
  const url = item.upload ? marker(item) : item.url;
  return { type: field, [field]: { url, ...item.settings } };
}

/**
 * The body as an object, and the media in prompt order with the place of each (`messages[i].content[j]`).
 * A turn is `{role, text, media}`; turns without text and media are left out, like the media in `without`.
 */
export function buildBody(model, turns, options, without = new Map()) {
  const messages = [];
  const media = [];
  for (const turn of turns) {
    if (turn.role === "assistant") {
      messages.push({ role: "assistant", content: turn.text });
      continue;
    }
    const content = [];
    for (const item of turn.media) {
      if (item.removed || without.has(item)) continue;
      media.push({ item, place: `messages[${messages.length}].content[${content.length}]` });
      content.push(mediaPart(item));
    }
    if (turn.text) content.push({ type: "text", text: turn.text });
    if (content.length) messages.push({ role: "user", content });
  }
  return { body: { model, messages, ...options }, media };
}

/** The body as a Blob of JSON, uploads in their places; their megabytes are never copied into one string. */
export function serialize(body, media) {
  let rest = JSON.stringify(body);
  const pieces = [];
  for (const { item } of media) {
    if (!item.upload) continue;
    const at = rest.indexOf(marker(item));
    pieces.push(rest.slice(0, at), item.upload);
    rest = rest.slice(at + marker(item).length);
  }
  return new Blob([...pieces, rest], { type: "application/json" });
}

const shellQuoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** A command for a POSIX shell; it reads uploads from files of their names. */
export function curlCommand(body, media, server, needsKey) {
  const key = needsKey ? ` -H "Authorization: Bearer $FILMSTRIP_API_KEY"` : "";
  const command = `curl ${server}v1/chat/completions${key} -H 'Content-Type: application/json'`;
  let rest = JSON.stringify(body, null, 2);
  const uploads = media.filter(({ item }) => item.upload);
  if (!uploads.length) return `${command} -d ${shellQuoted(rest)}`;
  const pieces = [];
  for (const { item } of uploads) {
    const at = rest.indexOf(marker(item));
    pieces.push(`printf %s ${shellQuoted(`${rest.slice(0, at)}data:${item.mediaType};base64,`)}`);
    pieces.push(`base64 < ${shellQuoted(item.name)} | tr -d '\\n'`);
    rest = rest.slice(at + marker(item).length);
  }
  pieces.push(`printf %s ${shellQuoted(rest)}`);
  return `{\n${pieces.join("\n")}\n} | ${command} --data-binary @-`;
}

const clientFields = ["model", "messages", "max_tokens", "temperature"];

/** A program for OpenAI's client; fields that the client does not know go into `extra_body`. */
export function pythonProgram(body, media, server, needsKey) {
  const uploads = new Map(media.filter(({ item }) => item.upload).map(({ item }) => [marker(item), item]));
  const known = Object.entries(body).filter(([name]) => clientFields.includes(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !clientFields.includes(name)));
  const lines = [];
  if (needsKey) lines.push("import os");
  if (uploads.size) lines.push("from base64 import b64encode", "from pathlib import Path");
  if (lines.length) lines.push("");
  lines.push("from openai import OpenAI", "");
  if (uploads.size) {
    lines.push(
      "",
      "def data_url(path: str, media_type: str) -> str:",
      '    return f"data:{media_type};base64," + b64encode(Path(path).read_bytes()).decode()',
      "",
      "",
    );
  }
  const apiKey = needsKey ? 'os.environ["FILMSTRIP_API_KEY"]' : '"none"';
  lines.push(`client = OpenAI(base_url=${JSON.stringify(`${server}v1`)}, api_key=${apiKey})`);
  lines.push("answer = client.chat.completions.create(");
  for (const [name, value] of known) lines.push(`    ${name}=${pythonValue(value, "    ", uploads)},`);
  if (Object.keys(extra).length) lines.push(`    extra_body=${pythonValue(extra, "    ", uploads)},`);
  lines.push(")", "print(answer.choices[0].message.content, answer.usage)");
  return lines.join("\n");
}

/** A JSON value as Python writes it; a string of JSON is one of Python, too. */
function pythonValue(value, indent, uploads) {
  const deeper = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "number") return String(value);
  if (typeof value === "string") {
    const item = uploads.get(value);
    if (item) return `data_url(${JSON.stringify(item.name)}, ${JSON.stringify(item.mediaType)})`;
    return JSON.stringify(value);
  }
  if (Array.isArray(value)) {
    if (!value.length) return "[]";
    return `[\n${value.map((each) => `${deeper}${pythonValue(each, deeper, uploads)},\n`).join("")}${indent}]`;
  }
  const entries = Object.entries(value);
  const inner = entries.map(([key, each]) => `${deeper}${JSON.stringify(key)}: ${pythonValue(each, deeper, uploads)},\n`);
  return entries.length ? `{\n${inner.join("")}${indent}}` : "{}";
}
