
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
  const title = (each) => (each.kind === "feature" ? `a feature of ${each.name}` : `${each.name} at ${each.site}`);
  const options = readings.map((each, n) => element("option", { value: n, text: title(each) }));
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
  const readout = element("p", { class: "readout small", id: `${event.side}-readout`, "aria-live": "polite" });
  side.box = tokenBox(`${event.side} answer`, readout);
  side.box.classList.add("writing");
  const promptBox = tokenBox(`the prompt of the ${event.side} answer`, readout);
  side.prompt = event.prompt.map((text) => put(promptBox, { text, special: false, of: "prompt" }));
  const summary = element("summary", { text: `The prompt as the model read it, ${side.prompt.length} tokens` });
  const asked = element("details", { class: "asked" }, summary, promptBox);
  section.replaceChildren(section.querySelector("h2"), side.box, readout, asked);
  walkable(side.box, side, "answer", readout);
  walkable(promptBox, side, "prompt", readout);
}

function tokenBox(label, readout) {
  const name = `${label}; the arrow keys go through its tokens`;
  return element("p", { class: "said", tabindex: 0, role: "group", "aria-label": name, "aria-describedby": readout.id });
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
  const isRead = token.value !== undefined || token.acted !== undefined;
  if (!isRead) return token.of === "prompt" || scale.reading === null ? "" : "the last token, which no pass read";
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
    readout.textContent = `${JSON.stringify(token.text)} ${words(token)}`.trim();
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
  const hasGates = plan.terms.some((term) => term.gate);
  const columns = ["intervention", "tokens of the prompt", "tokens of the answer", ...(hasGates ? ["gate"] : [])];
  const rows = plan.terms.map(({ name, gate }) => {
    const ofPrompt = `${side.promptActed[name] ?? 0} of ${side.prompt.length}`;
    const cells = [ofPrompt, `${acted(name)} of ${read}`, ...(hasGates ? [gate ?? ""] : [])];
    return element("tr", {}, element("th", { scope: "row", text: name }), ...cells.map((text) => element("td", { text })));
  });
  const caption = element("caption", { text: "On how many tokens each intervention acted, of those that a pass has read" });
  const head = element("tr", {}, ...columns.map((text) => element("th", { scope: "col", text })));
  byId("fired").replaceChildren(element("table", { class: "dense" }, caption, element("thead", {}, head), element("tbody", {}, ...rows)));
  byId("fired").hidden = false;
}

function request() {
  return { text: plan.text, prompt: byId("prompt").value, max_new_tokens: Number(byId("length").value) };
}

async function run() {
  const wanted = { ...request(), reading: chosenReading() };
  if (running) {
    again = JSON.stringify(wanted) !== asked;
    if (again) await post("stop", { number: count }).catch(show);
    return;
  }
  running = hasAnswered = true;
  asked = JSON.stringify(wanted);
  count += 1; // a stop that is late must not end the next answer
  byId("stop").disabled = false;
  byId("answers").setAttribute("aria-busy", "true");
  forget();
  scale = { reading: null, most: 0 };
  try {
    for await (const event of events("answers", { ...wanted, number: count })) {
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
