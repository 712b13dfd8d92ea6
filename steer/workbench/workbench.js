"use strict";
// What a model says, and what is asked of it, is put on the page as text nodes: nothing of it is ever read as HTML.
const byId = (id) => document.getElementById(id);
const MINUS = "\u2212";
let plan = { text: "", terms: [] };
let bounds = []; // of the sliders, which only grow
let gates = {};
let readings = [];
let running = false;
let asked = ""; // the request that is being answered
let refused = null; // the error of the field that is marked as invalid
let again = false; // something changed while an answer was being made
let hasAnswered = false;
let queue = Promise.resolve(); // changes of the plan, one after the other

function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") made.textContent = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function number(value, signed = false) {
  const size = Math.abs(value);
  const text = size !== 0 && (size < 0.001 || size >= 1e6) ? size.toExponential(1) : String(Number(size.toPrecision(3)));
  return `${value < 0 ? MINUS : signed && value > 0 ? "+" : ""}${text}`;
}

// ---- the server

const BROKEN_OFF = { type: "No answer", what: "the server broke off", expected: "", found: "", remedy: "look at the terminal where 'steer show' runs" };

class Refused extends Error {
  constructor(said) {
    super(said.what);
    this.said = said;
  }
}

async function send(name, request) {
  try {
    return await fetch(name, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request) });
  } catch {
    throw new Refused(BROKEN_OFF);
  }
}

async function post(name, request = {}) {
  const response = await send(name, request);
  if (!response.headers.get("Content-Type")?.startsWith("application/json"))
    throw new Refused({ type: "Refused", what: (await response.text()).trim(), expected: "", found: "", remedy: "" });
  const content = await response.json();
  if (content.error) throw new Refused(content.error);
  return content;
}

async function* events(name, request) {
  const response = await send(name, request);
  if (!response.ok) throw new Refused({ type: "Refused", what: (await response.text()).trim(), expected: "", found: "", remedy: "" });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch {
      throw new Refused(BROKEN_OFF);
    }
    if (part.done) throw new Refused(BROKEN_OFF); // the last event comes before the end
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.event === "error") throw new Refused(event.error);
      if (event.event === "end") return;
      yield event;
    }
  }
}

function show(error) {
  if (!(error instanceof Refused)) throw error;
  const { type, what, ...more } = error.said;
  const lines = Object.entries(more).filter(([, text]) => text !== "").map(([name, text]) => `\n${name}: ${text}`);
  byId("error").replaceChildren(element("b", { text: type }), `: ${what}${lines.join("")}`);
  byId("error").hidden = false;
}

function forget() {
  byId("error").hidden = true;
}

// ---- the plan

// field: what was changed; it is marked where the plan cannot be read with it, and the plan stays as it was
function change(field, request) {
  queue = queue.then(async () => {
    try {
      setPlan(await post("plan", { text: plan.text, ...request }));
      forget();
      if (byId("live").checked && hasAnswered) run();
    } catch (error) {
      field.setAttribute("aria-invalid", "true");
      field.setAttribute("aria-describedby", "error");
      refused = error;
      show(error);
    }
  });
}

function setPlan(next) {
  const isSame = next.terms.length === plan.terms.length && next.terms.every((term, n) => alike(term, plan.terms[n]));
  plan = next;
  byId("text").value = plan.text;
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  if (!isSame) {
    bounds = plan.terms.map((term) => term.bound);
    byId("terms").replaceChildren(...plan.terms.map((term, n) => termCard(term, n)));
  }
  plan.terms.forEach(fillTerm);
}

// the same fields show both
function alike(a, b) {
  return a.name === b.name && a.what === b.what && a.gate === b.gate && a.sites.join() === b.sites.join();
}

function termCard(term, n) {
  const card = element("section", { class: "term", "aria-label": term.name }, element("h3", {}, element("code", { text: term.what })));
  const strength = element("input", { type: "number", step: "any", id: `strength-${n}` });
  const slider = element("input", { type: "range", "aria-label": `strength of ${term.name}` });
  slider.addEventListener("input", () => {
    strength.value = slider.value;
    fillDose(n, Number(slider.value));
  });
  slider.addEventListener("change", () => change(strength, { changes: [{ term: n, strength: Number(slider.value) }] }));
  strength.addEventListener("change", () => {
    if (strength.value !== "") change(strength, { changes: [{ term: n, strength: Number(strength.value) }] });
  });
  card.append(element("div", { class: "field" }, element("label", { for: `strength-${n}`, text: "strength" }), slider, strength, element("span", { class: "ends" })));
  if (term.sites.length > 1) {
    const layer = element("input", { type: "range", min: 0, max: term.sites.length - 1, step: 1, id: `site-${n}` });
    const name = element("code", { class: "site" });
    layer.addEventListener("input", () => (name.textContent = term.sites[layer.value]));
    layer.addEventListener("change", () => change(layer, { changes: [{ term: n, site: term.sites[layer.value] }] }));
    card.append(element("div", { class: "field" }, element("label", { for: `site-${n}`, text: "layer" }), layer, name));
  } else {
    card.append(element("div", { class: "field" }, element("label", { text: "layer" }), element("code", { class: "fixed site" })));
  }
  const scope = element("input", { type: "text", class: "scope", id: `scope-${n}`, spellcheck: "false", autocapitalize: "off" });
  scope.addEventListener("change", () => change(scope, { changes: [{ term: n, scope: scope.value }] }));
  card.append(element("div", { class: "field" }, element("label", { for: `scope-${n}`, text: "scope" }), scope));
  if (term.gate) card.append(element("div", { class: "field" }, element("label", { text: "gate" }), element("span", { class: "fixed", text: `${term.gate}: ${gates[term.gate] ?? ""}` })));
  card.append(element("p", { class: "note small dose" }), element("p", { class: "note small about" }));
  return card;
}

function fillTerm(term, n) {
  const card = byId("terms").children[n];
  bounds[n] = Math.max(bounds[n], term.bound);
  const slider = card.querySelector("input[type=range]");
  Object.assign(slider, { min: -bounds[n], max: bounds[n], step: bounds[n] / 100, value: term.strength });
  byId(`strength-${n}`).value = term.strength;
  card.querySelector(".ends").replaceChildren(...[-bounds[n], 0, bounds[n]].map((end) => element("span", { text: number(end) })));
  card.querySelector(".site").textContent = term.site;
  if (byId(`site-${n}`)) byId(`site-${n}`).value = term.sites.indexOf(term.site);
  byId(`scope-${n}`).value = term.scope;
  card.querySelector(".about").textContent = `${term.about}${term.sites.length > 1 ? "; each layer has a vector of its own" : ""}`;
  fillDose(n, term.strength);
}

function fillDose(n, strength) {
  const { dose } = plan.terms[n];
  const note = byId("terms").children[n].querySelector(".dose");
  note.hidden = dose === null;
  if (dose !== null) note.textContent = `adds ${number(Math.abs(strength) * dose * 100)} % of the length of an activation`;
}

// ---- colours

const sides = { plain: newSide(), steered: newSide() };
let scale = { reading: null, most: 0 };

function newSide() {
  return { prompt: [], answer: [], promptActed: {}, isRead: false };
}

function chosenReading() {
  const choice = readings[Number(byId("reading").value)];
  if (choice === undefined) return null;
  return choice.kind === "feature" ? { ...choice, feature: Number(byId("feature").value) } : choice;
}

function listReadings() {
  const options = readings.map((each, n) => element("option", { value: n, text: each.kind === "feature" ? `a feature of ${each.name}` : `${each.name} at ${each.site}` }));
  byId("reading").replaceChildren(...options, element("option", { value: -1, text: "nothing" }));
  const first = plan.terms[0];
  const own = readings.findIndex((each) => each.name === first.source && (each.kind === "feature" || each.site === first.site));
  byId("reading").value = own >= 0 ? own : readings.length ? 0 : -1;
  const named = plan.terms.find((term) => term.features.length);
  if (named) byId("feature").value = named.features[0];
}

function fillReading() {
  const choice = readings[Number(byId("reading").value)];
  byId("feature-label").hidden = choice?.kind !== "feature";
  if (choice?.kind === "feature") byId("feature").max = choice.width - 1;
}

function colour(token) {
  if (typeof token.value !== "number" || scale.most === 0) return;
  const share = Math.min(100, (100 * Math.abs(token.value)) / scale.most);
  token.element.classList.toggle("plus", token.value > 0);
  token.element.classList.toggle("minus", token.value < 0);
  token.element.style.setProperty("--v", `${share.toFixed(1)}%`);
}

// the scale ends at the largest value of an answer; the first tokens of a prompt are often far beyond it
function widen(value) {
  if (!(Math.abs(value) > scale.most)) return;
  scale.most = Math.abs(value);
  for (const side of Object.values(sides)) [...side.prompt, ...side.answer].forEach(colour);
  legend();
}

function legend() {
  const { reading, most } = scale;
  if (reading === null) {
    byId("legend").replaceChildren();
    return;
  }
  const bar = element("span", { class: reading.signed ? "bar" : "bar half", "aria-hidden": "true" });
  const ends = most === 0 ? "" : number(most);
  const line = element("p", { class: "scale" });
  line.append(reading.signed ? `${ends && MINUS}${ends}` : "0", bar, `${reading.signed && ends ? "+" : ""}${ends} ${reading.unit}`);
  const said = `0: ${reading.zero}. Read at ${reading.site}, after the edits of the plan. Underlined: the plan acted on this token.`;
  byId("legend").replaceChildren(line, element("p", { class: "small", text: said }));
}

// ---- answers

function begin(event) {
  const side = (sides[event.side] = newSide());
  const section = byId(event.side);
  const box = (label, id) => element("p", { class: "said", tabindex: 0, role: "group", "aria-label": `${label}; the arrow keys go through its tokens`, "aria-describedby": id });
  const readout = element("p", { class: "readout small", id: `${event.side}-readout`, "aria-live": "polite" });
  side.box = box(`${event.side} answer`, readout.id);
  side.box.classList.add("writing");
  const promptBox = box(`the prompt of the ${event.side} answer`, readout.id);
  side.prompt = event.prompt.map((text) => put(promptBox, { text, special: false, of: "prompt" }));
  const asked = element("details", { class: "asked" }, element("summary", { text: `The prompt as the model read it, ${side.prompt.length} tokens` }), promptBox);
  section.replaceChildren(section.querySelector("h2"), side.box, readout, asked);
  walkable(side.box, side, "answer", readout);
  walkable(promptBox, side, "prompt", readout);
}

function put(box, token) {
  token.element = element("span", { class: token.special ? "token special" : "token", text: token.text });
  box.append(token.element);
  return token;
}

function add(event) {
  const side = sides[event.side];
  const read = side.isRead ? side.answer.slice(-1) : side.prompt;
  read.forEach((token, place) => {
    token.value = event.values[place];
    if (side.isRead) {
      token.acted = Object.keys(event.acted).filter((name) => event.acted[name] > 0);
      token.element.classList.toggle("acted", token.acted.length > 0);
      if (typeof token.value === "number") widen(token.value);
    }
    colour(token);
    token.element.title = words(token);
  });
  if (!side.isRead) side.promptActed = event.acted;
  side.isRead = true;
  const token = put(side.box, { text: event.text, special: event.special });
  token.element.title = words(token);
  side.answer.push(token);
  if (event.side === "steered") fired();
}

function words(token) {
  if (token.value === undefined && token.acted === undefined) return token.of === "prompt" || scale.reading === null ? "" : "the last token, which no pass read";
  const value = typeof token.value === "number" ? [`${number(token.value, scale.reading.signed)} ${scale.reading.unit}`] : [];
  const acted = token.acted?.length ? [`${token.acted.join(", ")} acted on it`] : [];
  return [...value, ...acted].join("; ");
}

function walkable(box, side, part, readout) {
  let at = -1;
  const choose = (place) => {
    side[part][at]?.element.classList.remove("chosen");
    at = place;
    const token = side[part][at];
    if (!token) {
      readout.textContent = "";
      return;
    }
    token.element.classList.add("chosen");
    token.element.scrollIntoView({ block: "nearest" });
    readout.textContent = `${JSON.stringify(token.text)} ${words(token)}`;
  };
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    choose(Math.max(0, Math.min(side[part].length - 1, at + step)));
  });
  box.addEventListener("blur", () => choose(-1));
  box.addEventListener("mouseover", (event) => {
    const place = side[part].findIndex((token) => token.element === event.target);
    if (place >= 0) choose(place);
  });
  box.addEventListener("mouseleave", () => choose(-1));
}

function finish(event) {
  const side = sides[event.side];
  side.box.classList.remove("writing");
  const section = byId(event.side);
  section.querySelector(".summary")?.remove();
  const said = `${event.tokens} tokens in ${event.seconds.toFixed(1)} s${event.stopped ? ", stopped" : ""}`;
  section.querySelector("details").before(element("p", { class: "small summary", text: said }));
}

function fired() {
  const side = sides.steered;
  const read = side.answer.length - 1; // the newest token was read by no pass yet
  const acted = (name) => side.answer.filter((token) => token.acted?.includes(name)).length;
  const rows = plan.terms.map((term) =>
    element("tr", {}, element("th", { scope: "row", text: term.name }), element("td", { text: `${side.promptActed[term.name] ?? 0} of ${side.prompt.length}` }),
      element("td", { text: `${acted(term.name)} of ${read}` }), element("td", { text: term.gate ?? "" })));
  const head = element("tr", {}, ...["intervention", "tokens of the prompt", "tokens of the answer", "gate"].map((text) => element("th", { scope: "col", text })));
  byId("fired").replaceChildren(element("table", { class: "dense" }, element("caption", { text: "On how many tokens each intervention acted, of those that a pass has read" }), element("thead", {}, head), element("tbody", {}, ...rows)));
  byId("fired").hidden = false;
}

function request() {
  return { text: plan.text, prompt: byId("prompt").value, max_new_tokens: Number(byId("length").value) };
}

async function run() {
  const wanted = { ...request(), reading: chosenReading() };
  if (running) {
    again = JSON.stringify(wanted) !== asked;
    if (again) await post("stop").catch(show);
    return;
  }
  running = hasAnswered = true;
  asked = JSON.stringify(wanted);
  byId("stop").disabled = false;
  byId("answers").setAttribute("aria-busy", "true");
  forget();
  scale = { reading: null, most: 0 };
  try {
    for await (const event of events("answers", wanted)) {
      if (event.event === "reading") {
        scale.reading = event.reading;
        legend();
      } else if (event.event === "start") begin(event);
      else if (event.event === "token") add(event);
      else if (event.event === "done") finish(event);
    }
  } catch (error) {
    show(error);
  }
  for (const side of Object.values(sides)) side.box?.classList.remove("writing");
  running = false;
  byId("stop").disabled = true;
  byId("answers").removeAttribute("aria-busy");
  if (again) {
    again = false;
    run();
  }
}

// ---- copying and saving

function tell(said, text) {
  byId("copied").replaceChildren(`${said} `, element("code", { class: "command block", text }));
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    tell("Copied:", text);
  } catch {
    tell("The browser does not let a page copy; here it is:", text);
  }
}

byId("copy-text").addEventListener("click", () => copy(plan.text));
byId("copy-command").addEventListener("click", async () => {
  await post("command", request()).then(({ command }) => copy(command), show);
});
byId("save").addEventListener("click", () => post("save", { text: plan.text }).then(({ path }) => tell("Saved; in Python:", `plan = steer.Plan.load(${JSON.stringify(path)})`), show));

// ---- controls

byId("asking").addEventListener("submit", (event) => {
  event.preventDefault();
  if (byId("text").value !== plan.text && !byId("text").hasAttribute("aria-invalid")) byId("text").dispatchEvent(new Event("change"));
  queue.then(() => (document.querySelector("[aria-invalid]") ? show(refused) : run()));
});
byId("stop").addEventListener("click", () => {
  again = false;
  post("stop").catch(show);
});
for (const id of ["prompt", "text"])
  byId(id).addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("asking").requestSubmit();
  });
byId("text").addEventListener("change", () => change(byId("text"), { text: byId("text").value }));
byId("offered").addEventListener("change", () => {
  byId("prompt").value = byId("offered").value;
  if (byId("live").checked && hasAnswered) run();
});
for (const id of ["reading", "feature"])
  byId(id).addEventListener("change", () => {
    fillReading();
    if (hasAnswered) run();
  });

async function open() {
  const response = await fetch("state");
  const state = await response.json();
  gates = state.gates;
  readings = state.readings;
  document.title = `${state.model}: steer workbench`;
  byId("model").textContent = state.model;
  byId("prompt").value = state.prompts[0] ?? "";
  byId("length").value = state.max_new_tokens;
  byId("length").max = state.longest;
  byId("save").hidden = state.folder === null;
  byId("save").title = `into ${state.folder}`;
  if (state.prompts.length > 1) {
    byId("offered").replaceChildren(...state.prompts.map((prompt) => element("option", { value: prompt, text: prompt })));
    byId("offered").hidden = byId("offered-label").hidden = false;
  }
  setPlan(state.plan);
  listReadings();
  fillReading();
  for (const side of ["plain", "steered"]) byId(side).append(element("p", { class: "hint", text: side === "plain" ? "What the model says as it is." : "What it says under the plan." }));
  if (state.prompts.length) run();
}

open();
