// The page: media and questions in, plans, pictures and answers on the screen.

import { ApiError, getModel, hasApiKey, planMedia, setApiKey, showFrames, streamChat } from "./api.js";
import { AnswerView, clearConversation, showQuestion } from "./chat.js";
import { announce, byId, count, percent, showText } from "./dom.js";
import { Card, fromAddress, fromFile } from "./media.js";
import { buildBody, curlCommand, pythonProgram, serialize } from "./request.js";

const planDelay = 250; // milliseconds after the last change
const maxThumbnails = 256; // the server's own limit
const state = { model: null, cards: [], turns: [], pending: [], running: null, planning: null, planTimer: 0, errors: {} };

// The request that would be sent now

function options() {
  const chosen = { return_media_info: true };
  if (byId("max-tokens").value && byId("max-tokens").validity.valid) chosen.max_tokens = byId("max-tokens").valueAsNumber;
  if (byId("temperature").value && byId("temperature").validity.valid) {
    chosen.temperature = byId("temperature").valueAsNumber;
  }
  if (byId("fit").checked) chosen.media_overflow = "fit";
  return chosen;
}

function request(question, without) {
  const turns = [...state.turns, { role: "user", text: question, media: state.pending }];
  return buildBody(state.model.id, turns, options(), without);
}

// What will be seen and what it costs

function schedulePlan() {
  clearTimeout(state.planTimer);
  state.planning?.abort();
  showSnippet();
  if (!state.cards.length) {
    byId("cost").hidden = true;
    setError("plan", "");
    return;
  }
  setBusy(true);
  state.planTimer = setTimeout(plan, planDelay);
}

function setBusy(isBusy) {
  for (const card of state.cards) card.setBusy(isBusy);
  byId("cost").classList.toggle("busy", isBusy);
}

async function plan() {
  if (!state.model) return;
  const planning = new AbortController();
  state.planning = planning;
  const faults = new Map(); // what is wrong with an item; the others are shown all the same
  for (const { item, settingFault } of state.cards) if (settingFault) faults.set(item, settingFault);
  for (;;) {
    const { body, media } = request(byId("question").value.trim(), faults);
    if (!media.length && faults.size) byId("cost").hidden = true;
    else {
      try {
        await showPlan(body, media, planning.signal);
      } catch (error) {
        if (planning.signal.aborted) return; // by a change, which brings a plan of its own
        const atFault = itemAtFault(error, media);
        if (atFault) {
          faults.set(atFault, error.message);
          continue;
        }
        showServerError(error, "plan");
      }
    }
    for (const card of state.cards) card.showError(faults.get(card.item) ?? "");
    setBusy(false);
    return;
  }
}

/** Ask for a plan and then for its pictures, and show both. */
async function showPlan(body, media, signal) {
  const answer = await planMedia(serialize(body, media), signal);
  const isNew = media.map(({ item }, place) => cardOf(item).showPlan(answer.media[place]));
  showCost(answer);
  setError("plan", "");
  if (isNew.includes(true)) {
    const max_thumbnails = Math.min(maxThumbnails, 64 * media.length);
    const shown = await showFrames(serialize({ ...body, max_thumbnails }, media), signal);
    media.forEach(({ item }, place) => cardOf(item).showFrames(shown.media[place], answer.media[place]));
  }
  announce(`${byId("cost-label").textContent}: ${byId("cost-text").textContent}`);
}

function itemAtFault(error, media) {
  if (error.status !== 400) return null;
  const named = media.find(({ place }) => error.param?.startsWith(`${place}.`));
  return (named ?? (media.length === 1 ? media[0] : null))?.item ?? null;
}

const cardOf = (item) => state.cards.find((card) => card.item === item);

function showCost(plan) {
  byId("cost").hidden = false;
  const share = plan.prompt_tokens / plan.max_model_len;
  byId("cost-text").textContent =
    `${count(plan.prompt_tokens)} of ${count(plan.max_model_len)} tokens (${percent(share)}), ${count(plan.media_tokens)} of them media`;
  const meter = byId("cost-meter");
  Object.assign(meter, { max: plan.max_model_len, low: plan.max_model_len - 1, high: plan.max_model_len, optimum: 0 });
  meter.value = plan.prompt_tokens;
  meter.classList.toggle("full", !plan.fits);
  showText(byId("advice"), plan.fits ? "" : `It does not fit. ${capitalized(plan.advice ?? "")}`);
}

const capitalized = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);

// Adding and removing media

function add(item) {
  const card = new Card(item, { onChange: schedulePlan, onRemove: () => remove(item) });
  state.cards.push(card);
  state.pending.push(item);
  byId("media-list").append(card.root);
  announce(`${item.name} was added`);
  schedulePlan();
}

function remove(item) {
  item.removed = true;
  cardOf(item).root.remove();
  state.cards = state.cards.filter((card) => card.item !== item);
  state.pending = state.pending.filter((other) => other !== item);
  announce(`${item.name} was removed`);
  byId("files").focus();
  schedulePlan();
}

async function addFiles(files) {
  const refused = [];
  setError("files", "");
  for (const file of files) {
    try {
      add(await fromFile(file));
    } catch (error) {
      refused.push(error.message);
      setError("files", refused.join(" "));
    }
  }
}

function addAddress(event) {
  event.preventDefault();
  const url = byId("url").value.trim();
  if (!url) return;
  byId("url").value = "";
  setError("files", ""); // which may have told to give an address
  add(fromAddress(url, byId("url-kind").value));
}

function guessKind() {
  if (/\.(jpe?g|png|webp|bmp|tiff?|avif)([?#]|$)/i.test(byId("url").value)) byId("url-kind").value = "image";
  else if (/\.(mp4|m4v|mov|webm|mkv|avi|gif|ts|flv|mpe?g|ogv)([?#]|$)/i.test(byId("url").value)) {
    byId("url-kind").value = "video";
  }
}

function drop(event) {
  event.preventDefault();
  byId("drop").classList.remove("over");
  if (event.dataTransfer.files.length) addFiles([...event.dataTransfer.files]);
  else {
    const text = event.dataTransfer.getData("text/uri-list").split("\n")[0].trim();
    if (!text) return;
    byId("url").value = text;
    guessKind();
    byId("url").focus();
  }
}

// Asking

async function ask(event) {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (!question || !state.model || state.running) return;
  const invalidField = state.cards.map((card) => card.invalidField).find(Boolean);
  if (invalidField) {
    invalidField.reportValidity(); // no answer about other frames than those that were asked for
    return;
  }
  const { body, media } = request(question);
  // What is added from now on goes with the next question.
  const asked = { role: "user", text: question, media: [...state.pending] };
  byId("empty").hidden = true;
  showQuestion(question, asked.media);
  byId("question").value = "";
  const view = new AnswerView(state.model.id);
  const asking = new AbortController();
  setRunning(asking);
  try {
    const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
    await receive(view, serialize(streamed, media), asking.signal);
    keep(asked, view.text);
  } catch (error) {
    if (asking.signal.aborted) {
      view.end("stopped", null, null);
      if (view.text) keep(asked, view.text);
    } else {
      view.fail(error.message);
      if (error.status === 401) showServerError(error, "server");
      byId("question").value ||= question;
    }
  } finally {
    setRunning(null);
    schedulePlan();
  }
}

/** Make a question and its answer part of the conversation. */
function keep(asked, text) {
  state.turns.push(asked, { role: "assistant", text });
  state.pending = state.pending.filter((item) => !asked.media.includes(item));
}

async function receive(view, body, signal) {
  let [finishReason, usage, media] = [null, null, null];
  for await (const chunk of streamChat(body, signal, () => view.enter("prefill"))) {
    media = chunk.media ?? media;
    usage = chunk.usage ?? usage;
    const choice = chunk.choices[0];
    if (choice?.delta.content) view.add(choice.delta.content);
    finishReason = choice?.finish_reason ?? finishReason;
  }
  view.end(finishReason, usage, media);
}

function setRunning(controller) {
  state.running = controller;
  byId("ask").disabled = Boolean(controller);
  byId("stop").hidden = !controller;
  byId("restart").hidden = Boolean(controller) || !byId("log").childElementCount;
  if (!controller) byId("question").focus({ preventScroll: true });
}

function restart() {
  state.turns = [];
  state.pending = state.cards.map((card) => card.item);
  clearConversation();
  byId("restart").hidden = true;
  byId("empty").hidden = false;
  byId("question").focus();
  announce("A new conversation with the same media");
  schedulePlan();
}

// The request as a program

function showSnippet() {
  if (!state.model || !byId("code").open) return;
  const { body, media } = request(byId("question").value.trim() || "What happens, and when?");
  const isCurl = byId("tab-curl").getAttribute("aria-selected") === "true";
  const server = new URL(".", document.baseURI).href;
  byId("snippet").textContent = (isCurl ? curlCommand : pythonProgram)(body, media, server, hasApiKey());
}

function choose(tab) {
  for (const each of [byId("tab-curl"), byId("tab-python")]) {
    each.setAttribute("aria-selected", String(each === tab));
    each.tabIndex = each === tab ? 0 : -1;
  }
  byId("code-panel").setAttribute("aria-labelledby", tab.id);
  showSnippet();
}

async function copySnippet() {
  try {
    await navigator.clipboard.writeText(byId("snippet").textContent);
    announce("Copied");
    byId("copy").textContent = "Copied";
  } catch {
    // Browsers give the clipboard to https and to this machine only; what is selected can always be copied.
    getSelection().selectAllChildren(byId("snippet"));
    byId("copy").textContent = "Selected, press Ctrl+C";
  }
  setTimeout(() => (byId("copy").textContent = "Copy"), 2000);
}

// The server

async function connect() {
  try {
    state.model = await getModel();
    byId("model").textContent = `${state.model.id}, up to ${count(state.model.max_model_len)} tokens`;
    byId("key-form").hidden = true;
    setError("server", "");
    setError("plan", "");
    schedulePlan();
  } catch (error) {
    byId("model").textContent = "not connected";
    showServerError(error, "server");
  }
}

/** Show what `source` ("server", "plan" or "files") has to say; each takes back its own words only. */
function setError(source, message) {
  state.errors[source] = message;
  showText(byId("server-error"), [...new Set(Object.values(state.errors))].filter(Boolean).join(" "));
}

function showServerError(error, source) {
  const needsKey = error instanceof ApiError && error.status === 401;
  if (needsKey) byId("key-form").hidden = false;
  const isFirst = needsKey && !hasApiKey();
  setError(source, isFirst ? "" : error.message);
  if (needsKey) byId("key").focus();
}

function useKey(event) {
  event.preventDefault();
  try {
    setApiKey(byId("key").value);
  } catch (error) {
    setError("server", error.message);
    byId("key").focus();
    return;
  }
  connect();
}

/** A link may bring an address and a question: `/#video=URL&question=TEXT`. Nothing is fetched before somebody adds it. */
function readLink() {
  const link = new URLSearchParams(location.hash.slice(1));
  for (const kind of ["video", "image"]) {
    if (link.get(kind)) {
      byId("url").value = link.get(kind);
      byId("url-kind").value = kind;
    }
  }
  byId("question").value = link.get("question") ?? "";
}

byId("files").addEventListener("change", (event) => {
  addFiles([...event.target.files]);
  event.target.value = ""; // the same file may be chosen again
});
byId("url-form").addEventListener("submit", addAddress);
byId("url").addEventListener("input", guessKind);
byId("fit").addEventListener("change", schedulePlan);
byId("ask-form").addEventListener("submit", ask);
byId("ask-form").addEventListener("input", showSnippet);
for (const field of [byId("max-tokens"), byId("temperature")]) {
  // A browser shows nothing of a fault inside closed details, and sends nothing either.
  field.addEventListener("invalid", () => (field.closest("details").open = true));
}
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask-form").requestSubmit();
});
byId("stop").addEventListener("click", () => state.running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.running?.abort();
});
byId("restart").addEventListener("click", restart);
byId("code").addEventListener("toggle", showSnippet);
for (const tab of [byId("tab-curl"), byId("tab-python")]) {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tab.id === "tab-curl" ? byId("tab-python") : byId("tab-curl");
    choose(other);
    other.focus();
  });
}
byId("copy").addEventListener("click", copySnippet);
byId("key-form").addEventListener("submit", useKey);
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  byId("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").classList.remove("over");
});
document.addEventListener("drop", drop);
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addFiles([...event.clipboardData.files]);
});
readLink();
connect();
