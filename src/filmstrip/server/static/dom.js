// Small helpers around the document and around numbers for people. All text is set as text, never as markup.

export const byId = (id) => document.getElementById(id);

/** A copy of the one element inside the template `id`. */
export function fromTemplate(id) {
  return byId(id).content.firstElementChild.cloneNode(true);
}

/** A new element with attributes and text. */
export function element(name, attributes = {}, text = "") {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return made;
}

/** A new SVG element with attributes. */
export function svgElement(name, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}

/** Show `text` in `target`, or hide it if there is none. */
export function showText(target, text) {
  if (target.textContent !== text) target.textContent = text; // an alert is read again whenever it is set
  target.hidden = !text;
}

/** Say something to people who listen instead of look. */
export function announce(text) {
  byId("status").textContent = text;
}

const integers = new Intl.NumberFormat("en");
export const count = (number) => integers.format(number);
export const counted = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
export const seconds = (value) => `${value.toFixed(value < 10 ? 2 : 1)} s`;

export function bytes(number) {
  if (number < 1024) return `${number} bytes`;
  const units = ["KiB", "MiB", "GiB"];
  let value = number / 1024;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value.toFixed(value < 10 ? 1 : 0)} ${units[unit]}`;
}

export function percent(share) {
  const value = 100 * share;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} %`;
}
