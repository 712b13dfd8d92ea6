// What a model says, and what is asked of it, is put on the page as text nodes: nothing of it is ever read as HTML.
const byId = (id) => document.getElementById(id);
const MINUS = "\u2212";
function number(value, signed = false) {
  const size = Math.abs(value);
  const text = size !== 0 && (size < 0.001 || size >= 1e6) ? size.toExponential(1) : String(Number(size.toPrecision(3)));
  return `${value < 0 ? MINUS : signed && value > 0 ? "+" : ""}${text}`;
}

// ---- the server

const BROKEN_OFF = { type: "No answer", what: "the server broke off", remedy: "look at the terminal where 'steer show' runs" };

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
    throw new Refused({ type: "Refused", what: (await response.text()).trim() });
  const content = await response.json();
  if (content.error) throw new Refused(content.error);
  return content;
}

async function* events(name, request) {
  const response = await send(name, request);
  if (!response.ok) throw new Refused({ type: "Refused", what: (await response.text()).trim() });
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
  const lines = Object.entries(more).map(([name, text]) => `\n${name}: ${text}`);
  byId("error").replaceChildren(element("b", { text: type }), `: ${what}${lines.join("")}`);
  byId("error").hidden = false;
}

function forget() {
  byId("error").hidden = true;
}
