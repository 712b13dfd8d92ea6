
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
byId("save").addEventListener("click", async () => {
  const loading = ({ path }) => tell("Saved; in Python:", `plan = steer.Plan.load(${JSON.stringify(path)})`);
  await post("save", { text: plan.text }).then(loading, show);
});

// ---- controls

byId("asking").addEventListener("submit", (event) => {
  event.preventDefault();
  if (byId("text").value !== plan.text && !byId("text").hasAttribute("aria-invalid")) byId("text").dispatchEvent(new Event("change"));
  queue.then(() => (document.querySelector("[aria-invalid]") ? show(refused) : run()));
});
byId("stop").addEventListener("click", () => {
  again = false;
  post("stop", { number: count }).catch(show);
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
  byId("plain").append(element("p", { class: "hint", text: "What the model says as it is." }));
  byId("steered").append(element("p", { class: "hint", text: "What it says under the plan." }));
  if (state.prompts.length) run();
}

open();
