// One video or image of the conversation: where it comes from, how it is looked at, and the card that shows it.

import { bytes, count, counted, element, fromTemplate, seconds, showText, svgElement } from "./dom.js";

const settingNames = ["fps", "num_frames", "start", "end"];
let lastId = 0;

/** Longest file that is sent along; a longer one would not fit a request, nor the memory of some browsers. */
export const maxFileBytes = 350 * 1024 * 1024;

/** An item from an address that the server opens. */
export function fromAddress(url, kind) {
  return { ...newItem(kind), url, name: nameOf(url) };
}

/** An item from a file, which is read here and sent with each request. Rejects what is too long or unreadable. */
export async function fromFile(file) {
  // A GIF is a video, moving or not; the server would take one that says "image" for a picture.
  const kind = file.type.startsWith("image/") && file.type !== "image/gif" ? "image" : "video";
  if (file.size > maxFileBytes) {
    throw new Error(
      `${file.name} has ${bytes(file.size)}; a page can send at most ${bytes(maxFileBytes)}. Put it where the server can ` +
        "read it and give its address.",
    );
  }
  const mediaType = file.type.startsWith(`${kind}/`) ? file.type : "application/octet-stream";
  const base64 = await readBase64(file);
  return { ...newItem(kind), name: file.name, mediaType, upload: new Blob([`data:${mediaType};base64,`, base64]) };
}

function newItem(kind) {
  lastId += 1;
  return { id: lastId, kind, url: null, upload: null, mediaType: null, name: "", settings: {}, removed: false };
}

function nameOf(url) {
  const path = url.split(/[?#]/)[0].replace(/\/+$/, "");
  const last = path.slice(path.lastIndexOf("/") + 1) || url;
  try {
    return decodeURIComponent(last);
  } catch {
    return last; // a lone percent sign
  }
}

function readBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

/** The card of an item. `onChange` is called when a setting changes, `onRemove` when it is removed. */
export class Card {
  constructor(item, { onChange, onRemove }) {
    this.item = item;
    this.root = fromTemplate("card-template");
    this.shown = "";
    this.find("h3").textContent = item.name;
    this.find("legend").textContent = `Which frames of ${item.name}`;
    const remove = this.find(".remove");
    remove.setAttribute("aria-label", `Remove ${item.name}`);
    remove.addEventListener("click", onRemove);
    this.connectFields(onChange);
    this.find(".strip").setAttribute("aria-label", `Frames of ${item.name} that will be seen`);
    if (item.kind === "image") for (const part of ["fieldset", ".timeline", ".timeline-ends"]) this.find(part).remove();
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  connectFields(onChange) {
    for (const name of settingNames) {
      const field = this.find(`[name=${name}]`);
      field.id = `${name}-${this.item.id}`;
      field.previousElementSibling.htmlFor = field.id;
      field.addEventListener("input", () => {
        if (field.value !== "" && field.validity.valid) this.item.settings[name] = field.valueAsNumber;
        else delete this.item.settings[name];
        onChange();
      });
    }
  }

  /** The first setting that is no number or none it may be, null if there is none. */
  get invalidField() {
    return this.find("input:invalid");
  }

  /** What the browser has against that setting; "" if there is none. */
  get settingFault() {
    const field = this.invalidField;
    return field ? `${field.labels[0].textContent}: ${field.validationMessage}` : "";
  }

  /** Whether an answer of the server is awaited. */
  setBusy(isBusy) {
    this.root.classList.toggle("busy", isBusy);
    this.root.setAttribute("aria-busy", String(isBusy));
  }

  /** Show what is wrong instead of the plan before, which holds no longer; without a message all is well. */
  showError(message) {
    showText(this.find(".card-error"), message);
    if (!message) return;
    this.find(".plan").textContent = "";
    this.find(".timeline")?.replaceChildren();
    this.find(".strip").replaceChildren();
    this.shown = "";
  }

  /** Show the server's plan; true if its frames are others than those shown. */
  showPlan(plan) {
    this.showError("");
    this.find(".facts").textContent = factsOf(plan.facts);
    this.find(".plan").textContent = planText(plan);
    if (this.item.kind === "video") {
      this.showPlaceholders(plan.facts.duration);
      this.drawTimeline(plan);
    }
    const now = JSON.stringify([plan.frame_indices, plan.width, plan.height]);
    const isNew = now !== this.shown;
    if (isNew) this.showEmptyFrames(plan);
    return isNew;
  }

  showPlaceholders(duration) {
    const hints = { fps: "model’s own", num_frames: "model’s own", start: "0", end: duration.toFixed(2) };
    for (const [name, hint] of Object.entries(hints)) this.find(`[name=${name}]`).placeholder = hint;
  }

  drawTimeline({ facts, timestamps }) {
    const at = (time) => (1000 * time) / facts.duration;
    const { start = 0, end = facts.duration } = this.item.settings;
    const marks = timestamps.map((time) => svgElement("line", { class: "tick", x1: at(time), x2: at(time), y1: 3, y2: 21 }));
    const [left, right] = [Math.min(at(start), 1000), Math.min(at(end), 1000)];
    this.find(".timeline").replaceChildren(
      svgElement("rect", { class: "track", x: 0, y: 10, width: 1000, height: 4 }),
      svgElement("rect", { class: "range", x: left, y: 5, width: Math.max(right - left, 0), height: 14 }),
      ...marks,
    );
    this.find(".from").textContent = seconds(0);
    this.find(".to").textContent = seconds(facts.duration);
  }

  /** The times at once, before their pictures are there; old pictures would be wrong ones. */
  showEmptyFrames(plan) {
    const strip = this.find(".strip");
    strip.replaceChildren();
    this.shown = ""; // whatever comes next, its pictures are not there
    if (this.item.kind === "image") return;
    for (const time of plan.timestamps.slice(0, 64)) {
      const picture = element("img", { alt: "", src: emptyPicture });
      picture.style.aspectRatio = `${plan.width} / ${plan.height}`;
      strip.append(frameOf(picture, seconds(time)));
    }
    strip.scrollLeft = 0;
  }

  /** Show the pictures of a plan; `plan` is the one they were made for. */
  showFrames(thumbnails, plan) {
    const size = { width: thumbnails.width, height: thumbnails.height };
    const made = thumbnails.frames.map(({ frame_index: index, timestamp, url }) => {
      const isFrame = index !== null;
      const alt = isFrame ? `Frame ${index}, at ${seconds(timestamp)}` : `${this.item.name} as the model sees it`;
      const picture = element("img", { ...size, alt, src: url, title: isFrame ? `frame ${index}` : "" });
      return frameOf(picture, isFrame ? seconds(timestamp) : "");
    });
    this.find(".strip").replaceChildren(...made);
    const hidden = thumbnails.num_frames - made.length;
    this.find(".plan").textContent = planText(plan) + (hidden ? ` ${count(made.length)} of them are shown here.` : "");
    this.shown = JSON.stringify([plan.frame_indices, plan.width, plan.height]);
  }
}

const emptyPicture = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==";

function frameOf(picture, label) {
  const figure = element("figure");
  figure.append(picture, element("figcaption", {}, label));
  const place = element("li");
  place.append(figure);
  return place;
}

function factsOf(facts) {
  const parts = [facts.codec ?? facts.format, `${facts.width} × ${facts.height}`];
  if (facts.duration != null) {
    const rate = `${Number(facts.fps.toFixed(2))} frames per second`;
    parts.push(seconds(facts.duration), facts.variable_frame_rate ? `${rate} on average` : rate);
    parts.push(counted(facts.total_num_frames, "frame"));
    if (facts.rotation_degrees) parts.push(`turned by ${facts.rotation_degrees}°`);
    if (facts.is_mirrored) parts.push("mirrored");
    if (facts.has_audio) parts.push("has sound, which is not used");
  }
  return [...parts.filter(Boolean), bytes(facts.num_bytes)].join(" · ");
}

function planText(plan) {
  const size = `${plan.width} × ${plan.height} pixels`;
  const tokens = counted(plan.num_tokens, "token");
  const notes = plan.notes.map((note) => ` Note: ${note}.`).join("");
  if (plan.type === "image") return `Seen at ${size}: ${tokens}.${notes}`;
  return `${counted(plan.num_frames, "frame")} of ${count(plan.facts.total_num_frames)} will be seen, at ${size}: ${tokens}.${notes}`;
}
