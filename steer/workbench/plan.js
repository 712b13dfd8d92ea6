
let plan = { text: "", terms: [] };
let bounds = []; // of the sliders, which only grow
let gates = {};
let readings = [];
let running = false;
let asked = ""; // the request that is being answered
let count = 0; // how many were asked
let refused = null; // the error of the field that is marked as invalid
let again = false; // something changed while an answer was being made
let hasAnswered = false;
let queue = Promise.resolve(); // changes of the plan, one after the other

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
  const ends = element("span", { class: "ends" });
  card.append(field(`strength-${n}`, "strength", slider, strength, ends));
  if (term.sites.length > 1) {
    const layer = element("input", { type: "range", min: 0, max: term.sites.length - 1, step: 1, id: `site-${n}` });
    const name = element("code", { class: "site" });
    layer.addEventListener("input", () => (name.textContent = term.sites[layer.value]));
    layer.addEventListener("change", () => change(layer, { changes: [{ term: n, site: term.sites[layer.value] }] }));
    card.append(field(`site-${n}`, "layer", layer, name));
  } else {
    card.append(field(`site-${n}`, "layer", element("output", { class: "fixed site", id: `site-${n}` })));
  }
  const scope = element("input", { type: "text", class: "scope", id: `scope-${n}`, spellcheck: "false", autocapitalize: "off" });
  scope.addEventListener("change", () => change(scope, { changes: [{ term: n, scope: scope.value }] }));
  card.append(field(`scope-${n}`, "scope", scope));
  if (term.gate) {
    const gate = element("output", { class: "fixed", id: `gate-${n}`, text: `${term.gate}: ${gates[term.gate]}` });
    card.append(field(gate.id, "gate", gate));
  }
  card.append(element("p", { class: "note small dose" }), element("p", { class: "note small about" }));
  return card;
}

function field(id, label, ...controls) {
  return element("div", { class: "field" }, element("label", { for: id, text: label }), ...controls);
}

function fillTerm(term, n) {
  const card = byId("terms").children[n];
  bounds[n] = Math.max(bounds[n], term.bound);
  const slider = card.querySelector("input[type=range]");
  Object.assign(slider, { min: -bounds[n], max: bounds[n], step: bounds[n] / 100, value: term.strength });
  byId(`strength-${n}`).value = term.strength;
  card.querySelector(".ends").replaceChildren(...[-bounds[n], 0, bounds[n]].map((end) => element("span", { text: number(end) })));
  card.querySelector(".site").textContent = term.site;
  if (term.sites.length > 1) byId(`site-${n}`).value = term.sites.indexOf(term.site);
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
