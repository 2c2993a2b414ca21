"use strict";
// Text of people and models goes into the page by textContent alone.
const get = (id) => document.getElementById(id);
const history = [];
let running = null; // aborts the answer in progress
let duels = false;
const VOTES = {left: "Left is better", right: "Right is better", tie: "Tie", both_bad: "Both are bad"};

function add(parent, tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  if (tag === "pre") made.dir = "auto";
  parent.append(made);
  return made;
}

async function call(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  if (get("key").value) headers.Authorization = "Bearer " + get("key").value;
  const options = body ? {method: "POST", body: JSON.stringify(body)} : {};
  const response = await fetch(path, {...options, headers, signal});
  if (response.ok) return response;
  if (response.status === 401) {
    get("key_label").hidden = false;
    document.querySelector("details").open = true;
  }
  const found = await response.json().catch(() => null);
  throw new Error(found?.error?.message ?? "the server answered with " + response.status);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) throw new Error("the server has gone");
    held += value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function request() {
  const body = {stream: true, messages: [...history]};
  if (get("system").value.trim()) body.messages.unshift({role: "system", content: get("system").value});
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    const text = get(name).value.trim();
    if (text && Number.isNaN(Number(text))) throw new Error(name + " must be a number");
    if (text) body[name] = Number(text);
  }
  return body;
}

function busy(is_busy) {
  get("send").hidden = is_busy;
  get("stop").hidden = !is_busy;
}

function answerBox(parent, title) {
  const box = add(parent, "div");
  if (title) add(box, "p", "title", title);
  return {box, text: add(box, "pre", "waits", "")};
}

function toEnd() {
  window.scrollTo(0, document.body.scrollHeight);
}

function show(answer, piece) {
  const is_at_end = window.innerHeight + window.scrollY > document.body.scrollHeight - 100;
  answer.text.textContent += piece;
  if (is_at_end) toEnd(); // a reader of earlier text stays there
}

async function ask(question) {
  get("problem").textContent = "";
  const asked = add(get("talk"), "div", "asked");
  add(asked, "pre", "", question);
  const answers = add(get("talk"), "div", "answers");
  history.push({role: "user", content: question});
  running = new AbortController();
  busy(true);
  toEnd();
  try {
    await (duels ? duel(answers) : converse(answers));
  } catch (error) {
    if (error.name !== "AbortError") get("problem").textContent = error.message;
    if (history.at(-1).role === "user") {
      history.pop();
      asked.remove();
      answers.remove();
      get("question").value = question;
    }
  }
  for (const text of answers.querySelectorAll(".waits")) text.classList.remove("waits");
  running = null;
  busy(false);
}

async function converse(answers) {
  const answer = answerBox(answers, "");
  try {
    for await (const event of events(await call("v1/chat/completions", request(), running.signal))) {
      show(answer, event.choices[0]?.delta?.content ?? "");
    }
  } finally {
    const text = answer.text.textContent;
    if (text) history.push({role: "assistant", content: text});
    else if (!running.signal.aborted) add(answers, "p", "faint", "an answer without a word");
  }
}

async function duel(answers) {
  const sides = {left: answerBox(answers, "Left"), right: answerBox(answers, "Right")};
  let name = null;
  for await (const event of events(await call("duels", request(), running.signal))) {
    if (event.side) show(sides[event.side], event.text);
    if (event.end) sides[event.end].text.classList.remove("waits");
    if (event.duel) name = event.duel;
  }
  history.push({role: "assistant", content: sides.left.text.textContent}); // until there is a vote
  const votes = add(answers.parentNode, "div", "votes");
  get("question").disabled = get("send").disabled = true;
  for (const [vote, label] of Object.entries(VOTES)) {
    const button = add(votes, "button", "", label);
    button.dataset.vote = vote;
    button.onclick = () => send(vote).catch((error) => { get("problem").textContent = error.message; });
  }
  toEnd();
  async function send(vote) {
    const found = await (await call("votes", {duel: name, vote})).json();
    for (const side of ["left", "right"]) {
      sides[side].box.querySelector(".title").textContent += ": " + found[side];
    }
    const kept = vote === "right" ? "right" : "left";
    if (vote === kept) sides[kept].box.className = "chosen";
    else if (vote === "tie") sides.left.box.className = sides.right.box.className = "tied";
    history.pop();
    const is_left_out = vote === "both_bad" || !sides[kept].text.textContent; // the question may be put again
    if (is_left_out) history.pop();
    else history.push({role: "assistant", content: sides[kept].text.textContent});
    let said = "Your vote: " + VOTES[vote] + (found.recorded ? "" : " (not recorded: an answer has no word)");
    said += is_left_out ? ". The conversation goes on without this question." : vote === "tie" ?
      ". The conversation goes on with the left answer." : ".";
    votes.remove();
    add(answers.parentNode, "p", "faint", said);
    get("question").disabled = get("send").disabled = false;
    get("question").focus();
    toEnd();
  }
}

get("ask").onsubmit = (event) => {
  event.preventDefault();
  const question = get("question").value.trim();
  if (!question || running || get("question").disabled) return;
  get("question").value = "";
  ask(question);
};
get("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    get("ask").requestSubmit();
  }
};
get("stop").onclick = () => running?.abort();
get("reset").onclick = () => {
  running?.abort();
  history.length = 0;
  get("talk").replaceChildren();
  get("question").disabled = get("send").disabled = false;
};

async function start() {
  const about = await (await call("about.json")).json();
  duels = about.duels;
  get("models").textContent = duels
    ? "Two models, one on each side. Which is where is shuffled for each question and shown after your vote."
    : about.models[0];
  for (const [name, value] of Object.entries(about.settings)) get(name).placeholder = value;
}
start().catch((error) => { get("problem").textContent = error.message; });
get("key").onchange = () => start().catch((error) => { get("problem").textContent = error.message; });
