// The conversation as it is shown: questions, answers that grow, where the time went, what came from the cache.

import { announce, byId, count, counted, element, fromTemplate, seconds } from "./dom.js";

const names = { prompt: "Fetch, decode", prefill: "Encode, prefill", answer: "Answer" };
const spoken = {
  prompt: "Sent. The server fetches and decodes.",
  prefill: "The prompt is ready. The model reads it.",
  answer: "The answer begins.",
};
const timeNote =
  "Measured in this browser. The server does not say where fetching ends and decoding begins, nor encoding and prefilling.";

/** An empty conversation. */
export function clearConversation() {
  byId("log").replaceChildren();
  byId("log").hidden = true;
}

/** Show a question with the names of the media that came with it. */
export function showQuestion(text, media) {
  const turn = newTurn("user", "You");
  turn.querySelector(".text").textContent = text;
  turn.querySelector(".notes").textContent = media.map((item) => item.name).join(", ");
}

function newTurn(role, who) {
  const turn = fromTemplate("turn-template");
  turn.classList.add(role);
  turn.querySelector(".who").textContent = who;
  const log = byId("log");
  log.hidden = false;
  log.append(turn);
  scrollToEnd();
  return turn;
}

function scrollToEnd() {
  byId("log").scrollTop = byId("log").scrollHeight;
}

/** Let the conversation grow, its end in view if it was: who scrolled up is reading something. */
function stayAtEnd(grow) {
  const log = byId("log");
  const wasAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 8;
  grow();
  if (wasAtEnd) scrollToEnd();
}

/** An answer from the moment the question is sent. */
export class AnswerView {
  constructor(modelName) {
    this.root = newTurn("assistant", modelName);
    this.root.setAttribute("aria-busy", "true"); // read out once it is whole
    this.text = "";
    this.times = [];
    this.find(".phases").append(element("li", { class: "note", title: timeNote }, "as seen from this browser"));
    this.enter("prompt");
    this.timer = setInterval(() => stayAtEnd(() => this.tick()), 100);
    scrollToEnd();
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  /** The next phase begins: "prompt", "prefill" or "answer". */
  enter(phase) {
    stayAtEnd(() => this.showPhase(phase));
    announce(spoken[phase]);
  }

  showPhase(phase) {
    this.leave();
    const label = element("li", { class: "now" });
    this.find(".note").before(label);
    this.times.push({ phase, started: performance.now(), label });
    this.tick();
  }

  leave() {
    const last = this.times.at(-1);
    if (!last || last.took !== undefined) return;
    last.took = performance.now() - last.started;
    last.label.classList.remove("now");
    last.label.textContent = `${names[last.phase]} ${seconds(last.took / 1000)}`;
  }

  tick() {
    const last = this.times.at(-1);
    if (last.took === undefined) {
      last.label.textContent = `${names[last.phase]} ${((performance.now() - last.started) / 1000).toFixed(1)} s`;
    }
  }

  add(delta) {
    if (this.times.at(-1).phase !== "answer") this.enter("answer");
    this.text += delta;
    stayAtEnd(() => (this.find(".text").textContent = this.text));
  }

  /** The last words: how it ended, token counts (null if it was stopped), what was looked at. */
  end(finishReason, usage, media) {
    stayAtEnd(() => {
      this.close();
      this.showEnd(finishReason, usage, media);
    });
    announce(finishReason === "stopped" ? "Stopped." : "The answer is complete.");
  }

  showEnd(finishReason, usage, media) {
    const notes = this.find(".notes");
    if (usage) notes.append(...this.countNotes(usage));
    for (const item of media ?? []) notes.append(element("span", {}, mediaNote(item)));
    if (finishReason === "length") notes.append(element("span", {}, "Cut at the longest answer that was allowed."));
    if (finishReason === "stopped") notes.append(element("span", {}, "Stopped."));
  }

  fail(message) {
    stayAtEnd(() => {
      this.close();
      this.find(".notes").append(element("span", { class: "error", role: "alert" }, message));
    });
  }

  close() {
    clearInterval(this.timer);
    this.leave();
    this.root.setAttribute("aria-busy", "false");
  }

  countNotes(usage) {
    const cached = usage.prompt_tokens_details.cached_tokens;
    const answer = this.times.find(({ phase }) => phase === "answer");
    const rate = answer && usage.completion_tokens > 1 ? (1000 * (usage.completion_tokens - 1)) / answer.took : 0;
    const speed = rate ? `, ${rate.toFixed(1)} per second` : "";
    const total = counted(usage.prompt_tokens, "prompt token");
    const made = [element("span", {}, `${total}; ${counted(usage.completion_tokens, "answer token")}${speed}`)];
    if (cached) made.unshift(element("span", { class: "cached" }, `${count(cached)} of ${total} from the cache`));
    return made;
  }
}

function mediaNote(item) {
  const how = item.cached ? "nothing was decoded" : "decoded for this answer";
  const frames = item.type === "video" ? `${counted(item.num_frames, "frame")}, ` : "";
  const notes = item.notes.map((note) => `; ${note}`).join("");
  return `Saw ${frames}${item.width} × ${item.height} pixels, ${counted(item.num_tokens, "token")} (${how})${notes}`;
}
