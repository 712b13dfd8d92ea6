// Everything is built with text nodes: no token of a text is ever read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 200;
const search = document.getElementById("search");
const order = document.getElementById("order");
const rows = document.getElementById("rows");
const count = document.getElementById("count");
const more = document.getElementById("more");
const card = document.getElementById("card");
const byNumber = new Map(data.features.map((feature) => [feature.i, feature]));
let found = [];
let shown = 0;

function visible(token) {
  return token.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
}

function percent(share) {
  return share === 0 ? "never on" : `${(100 * share).toPrecision(3)} %`;
}

function label(feature) {
  if (feature.name) return feature.name;
  const peaks = feature.examples.filter((example) => example.top).map((example) => data.tokens[example.t[example.p]].trim());
  return [...new Set(peaks)].slice(0, 4).join(", ");
}

// what a feature is searched by: its number, name, promoted tokens and the tokens at its peaks
for (const feature of data.features) {
  feature.label = label(feature);
  const tokens = [...feature.up.map(([token]) => token), ...feature.examples.map((example) => example.t[example.p])];
  feature.words = [feature.name, feature.label, ...tokens.map((token) => data.tokens[token])].join("\n").toLowerCase();
}

function matches(feature, wanted) {
  return wanted === "" || String(feature.i) === wanted || feature.words.includes(wanted);
}

function list() {
  const wanted = search.value.trim().toLowerCase();
  found = data.features.filter((feature) => matches(feature, wanted));
  if (order.value === "i") found.sort((a, b) => a.i - b.i);
  else found.sort((a, b) => b[order.value] - a[order.value] || a.i - b.i);
  if (wanted !== "" && byNumber.has(Number(wanted))) found.sort((a, b) => (b.i === Number(wanted)) - (a.i === Number(wanted)));
  rows.replaceChildren();
  shown = 0;
  count.textContent = `${found.length.toLocaleString("en")} of ${data.features.length.toLocaleString("en")}`;
  show();
}

function show() {
  const current = Number(location.hash.slice(1));
  for (const feature of found.slice(shown, shown + PAGE)) {
    const link = element("a", { href: `#${feature.i}` }, element("b", { text: feature.i }));
    link.append(element("span", feature.density ? { text: feature.label } : { text: "never on", class: "off" }));
    if (feature.i === current) link.setAttribute("aria-current", "true");
    rows.append(element("li", {}, link));
  }
  shown += PAGE;
  more.hidden = shown >= found.length;
}

function histogram(bars) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const most = Math.max(...bars, 1);
  const said = bars.map((tokens) => tokens.toLocaleString("en")).join(", ");
  const attributes = { class: "bars", viewBox: `0 0 ${bars.length} 100`, preserveAspectRatio: "none", role: "img" };
  attributes["aria-label"] = `Tokens in equal steps of the value: ${said}`;
  for (const [name, value] of Object.entries(attributes)) svg.setAttribute(name, value);
  bars.forEach((tokens, place) => {
    // the root shows rare large values beside many small ones
    const height = 100 * Math.sqrt(tokens / most);
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of Object.entries({ x: place + 0.08, width: 0.84, y: 100 - height, height })) bar.setAttribute(name, value);
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = `${tokens.toLocaleString("en")} tokens`;
    bar.append(title);
    svg.append(bar);
  });
  return svg;
}

function weights(title, tokens) {
  const items = tokens.map(([token, logit]) =>
    element("li", {}, element("code", { text: visible(data.tokens[token]) }), element("span", { text: logit.toFixed(2), class: "small" })));
  return element("div", {}, element("h3", { text: title }), element("ol", {}, ...items));
}

function example(one) {
  const text = element("p");
  one.t.forEach((token, place) => {
    const level = Number(one.v[place]);
    const word = visible(data.tokens[token]);
    if (level === 0 && place !== one.p) text.append(word);
    else text.append(element("span", { class: place === one.p ? "token peak" : "token", style: `--v:${level}`, text: word }));
  });
  return element("div", { class: "example" }, element("span", { class: "n", text: one.m }), text);
}

function fact(name, value) {
  return element("div", {}, element("dt", { text: name }), element("dd", { text: value }));
}

function open() {
  const feature = byNumber.get(Number(location.hash.slice(1))) ?? found.find((one) => one.density > 0) ?? found[0];
  for (const link of rows.querySelectorAll("a[aria-current]")) link.removeAttribute("aria-current");
  if (!feature) {
    card.replaceChildren(element("p", { class: "absent", text: "No feature." }));
    return;
  }
  rows.querySelector(`a[href="#${feature.i}"]`)?.setAttribute("aria-current", "true");
  const parts = [element("h2", { text: feature.name ? `${feature.i}: ${feature.name}` : `Feature ${feature.i}` })];
  parts.push(element("dl", { class: "facts" }, fact("on at", percent(feature.density)), fact("mean where on", feature.mean), fact("largest", feature.max)));
  if (feature.density > 0) {
    parts.push(element("h3", { text: "Values where it is on" }), histogram(feature.bars));
    parts.push(element("p", { class: "axis small" }, element("span", { text: "0" }), element("span", { text: "square root of the number of tokens" }), element("span", { text: feature.max })));
  }
  if (feature.up.length) parts.push(element("div", { class: "weights" }, weights("Promotes", feature.up), weights("Suppresses", feature.down)));
  const top = feature.examples.filter((one) => one.top);
  const others = feature.examples.filter((one) => !one.top);
  if (top.length) parts.push(element("h3", { text: "Largest in context" }), ...top.map(example));
  if (others.length) parts.push(element("h3", { text: "From the rest of its range" }), ...others.map(example));
  const near = feature.near.map(([other, cosine]) => element("li", {}, byNumber.has(other)
    ? element("a", { href: `#${other}`, text: `${other} ${byNumber.get(other).label}` })
    : element("span", { text: other }), element("span", { class: "small", text: ` ${cosine.toFixed(2)}` })));
  if (near.length) parts.push(element("h3", { text: "Nearest decoder rows, by cosine" }), element("ul", { class: "near" }, ...near));
  card.replaceChildren(...parts);
}

let waiting;
search.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(list, 120);
});
search.form.addEventListener("submit", (event) => {
  event.preventDefault();
  list();
  if (found.length) location.hash = `#${found[0].i}`;
});
order.addEventListener("change", list);
more.addEventListener("click", show);
addEventListener("hashchange", () => {
  open();
  card.focus({ preventScroll: true });
  if (matchMedia("(max-width: 56rem)").matches) card.scrollIntoView();
  else scrollTo({ top: 0 });
});
list();
open();
