// Controls, keys and the address; the page begins here.

const THEMES = ["", "light", "dark"];
const MOST_NOTES = 30;

function option(value, text, fields = {}) {
  return el("option", { value, text, ...fields });
}

function drawControls() {
  const run = theRun();
  byId("run").replaceChildren(...INDEX.runs.map((one) => option(one.name, one.name)));
  byId("run").value = run.name;
  const steps = run.sets.filter((set) => set.kind === "step");
  const choices = run.sets.map((set) => option(set.name, `${set.title}${set.problem ? " – cannot be read" : ` (${set.samples})`}`));
  if (steps.length > 1) choices.push(option(ALL, `all ${steps.length} steps`));
  byId("step").replaceChildren(...choices);
  byId("step").value = state.step;
  const sets = chosenSets();
  const sorts = sortKeys(sets);
  if (!sorts.has(state.sort)) state.sort = "";
  byId("sort").replaceChildren(...[...sorts].map(([value, text]) => option(value, text)));
  byId("sort").value = state.sort;
  byId("order").textContent = state.down ? "↓" : "↑";
  byId("order").setAttribute("aria-label", state.down ? "descending" : "ascending");
  byId("search").value = state.search;
  drawFilters(sets);
  drawColours(sets);
  drawNotes(run, sets);
}

const chosenSets = () => theRun().sets.filter((set) => (state.step === ALL ? set.kind === "step" : set.name === state.step));

function drawFilters(sets) {
  const nodes = INDEX.filters.map((one, place) => {
    const why = sets.length && sets.every((set) => one.name in set.absent) ? sets[0].absent[one.name] : "";
    const count = sets.reduce((sum, set) => sum + ((set.counts || {})[one.name] || 0), 0);
    const on = state.filter.includes(one.name);
    const title = why ? `${one.meaning}. Not known here: ${why}` : `${one.meaning} (key ${place + 1})`;
    const text = why ? one.title : `${one.title} ${count}`;
    return el("button", { class: on ? "filter on" : "filter", "aria-pressed": on ? "true" : "false", disabled: Boolean(why) && !on, text, title, id: `filter-${one.name}`, onclick: () => toggleFilter(one.name) });
  });
  byId("filters").replaceChildren(...nodes);
}

function drawColours(sets) {
  const choices = colours(sets[0] || { absent: {} });
  const nodes = choices.map((one) => option(one.name, one.why ? `${one.title} – not known` : one.title, { disabled: Boolean(one.why), title: one.why }));
  byId("colour").replaceChildren(...nodes);
  byId("colour").value = choices.some((one) => one.name === state.colour && !one.why) ? state.colour : "";
  const unknown = choices.filter((one) => one.why);
  byId("unknown").hidden = !unknown.length;
  byId("unknown-list").replaceChildren(...unknown.map((one) => el("li", {}, el("b", { text: one.title }), `: ${one.why}`)));
}

function drawNotes(run, sets) {
  const lines = sets.filter((set) => set.problem).map((set) => `${set.title} cannot be read: ${set.problem}`);
  if (run.leftOut.length) lines.push(`${run.leftOut.length} further saved steps are not in this page. megatron-sr1 report RUN --step N writes one with step N, --step all one with all.`);
  lines.push(...sets.flatMap((set) => set.notes));
  if (lines.length > MOST_NOTES) lines.splice(MOST_NOTES, Infinity, `... and ${lines.length - MOST_NOTES} more.`);
  byId("notes").replaceChildren(...lines.map((line) => el("p", { class: "note", text: line })));
}

// ---------------------------------------------------------------- going somewhere
async function show() {
  byId("overview").hidden = true;
  byId("viewer").hidden = false;
  byId("to-overview").removeAttribute("aria-current");
  byId("to-viewer").setAttribute("aria-current", "page");
  const missing = state.run && !theRun() ? `run ${state.run}` : state.step && state.step !== ALL && !theSet() ? `step ${state.step}` : "";
  if (missing) Object.assign(state, { step: "", sample: "" });
  if (!theRun()) state.run = INDEX.runs[0].name;
  const run = theRun();
  if (!theSet() && state.step !== ALL) state.step = run.sets.find((set) => set.samples)?.name || run.sets[0]?.name || "";
  drawControls();
  const place = `${state.run}\n${state.step}`;
  if (list.place !== place) {
    list.place = place;
    list.rows = [];
    byId("detail").replaceChildren(el("p", { class: "note", text: "Loading …" }));
    let rows;
    try {
      rows = await loadRows(run);
    } catch (error) {
      list.place = null;
      byId("detail").replaceChildren(el("p", { class: "problem", text: error.message }));
      return;
    }
    if (list.place !== place) return;
    list.rows = rows;
  }
  chooseRows();
  const gone = missing || (state.sample && !list.rows.some((row) => idOf(row) === state.sample) ? `sample ${state.sample}` : "");
  if (list.at < 0 && list.shown.length && !gone) list.at = 0;
  drawList();
  intoSight();
  if (gone) notHere(gone);
  else if (list.at >= 0) await openAt(list.at);
  else nothing();
}

// Of an address: another sample in its place would be taken for it.
function notHere(what) {
  Object.assign(detail, { row: null, group: null });
  state.sample = "";
  byId("detail").replaceChildren(el("p", { class: "problem", text: `This page has no ${what}. Choose what it has, above and in the list.` }));
}

function nothing() {
  detail.row = null;
  const why = list.rows.length ? "No sample passes the filters." : "There is no sample here.";
  byId("detail").replaceChildren(el("p", { class: "note", text: why }));
}

async function openAt(place) {
  const row = list.shown[place];
  if (!row) return;
  list.at = place;
  state.sample = idOf(row);
  writeAddress();
  drawRows();
  intoSight();
  drawRows();
  const newGroup = !detail.row || detail.row.set !== row.set || groupOf(detail.row, "number") !== groupOf(row, "number");
  try {
    await openRow(row);
  } catch (error) {
    byId("detail").replaceChildren(el("p", { class: "problem", text: error.message }));
  }
  if (newGroup) byId("detail").scrollTop = 0;
}

// Also one that the filters hide: then they are lifted.
function openSample(set, group, number) {
  const find = () => list.shown.findIndex((row) => row.set === set && groupOf(row, "number") === group && row.table.sample[row.index] === number);
  let place = find();
  if (place < 0) {
    Object.assign(state, { filter: [], search: "" });
    chooseRows();
    drawControls();
    drawList();
    place = find();
  }
  return openAt(place);
}

function change(changes) {
  Object.assign(state, changes);
  return show();
}

function toggleFilter(name) {
  const on = state.filter.includes(name);
  return change({ filter: on ? state.filter.filter((one) => one !== name) : [...state.filter, name] });
}

function step(by) {
  const sets = theRun().sets;
  const at = sets.findIndex((set) => set.name === state.step);
  const next = sets[Math.min(sets.length - 1, Math.max(0, at + by))];
  if (next && next.name !== state.step) change({ step: next.name, sample: "" });
}

function nextGroup(by) {
  const own = list.shown[list.at];
  if (!own) return;
  const isOther = (row) => row.set !== own.set || row.table.group[row.index] !== own.table.group[own.index];
  for (let place = list.at + by; place >= 0 && place < list.shown.length; place += by) {
    if (isOther(list.shown[place])) {
      openAt(place);
      return;
    }
  }
}

function nextColour() {
  const choices = colours(chosenSets()[0] || { absent: {} }).filter((one) => !one.why);
  const at = choices.findIndex((one) => one.name === state.colour);
  setColour(choices[(at + 1) % choices.length].name);
}

function setColour(name) {
  state.colour = name;
  byId("colour").value = name;
  writeAddress();
  drawDetail();
}

function overview() {
  byId("overview").hidden = false;
  byId("viewer").hidden = true;
  byId("to-viewer")?.removeAttribute("aria-current");
  byId("to-overview").setAttribute("aria-current", "page");
}

function route() {
  if (INDEX.runs.length && readAddress()) show();
  else overview();
}

// ---------------------------------------------------------------- keys
const KEYS = {
  j: () => openAt(Math.min(list.shown.length - 1, list.at + 1)),
  k: () => openAt(Math.max(0, list.at - 1)),
  n: () => nextGroup(1),
  p: () => nextGroup(-1),
  "[": () => step(-1),
  "]": () => step(1),
  c: nextColour,
  "/": () => byId("search").focus(),
  t: nextTheme,
  o: () => (location.hash = byId("viewer").hidden ? address({ run: state.run || INDEX.runs[0].name }) : "#overview"),
  "?": () => toggleHelp(),
};
const SAME = { ArrowDown: "j", ArrowUp: "k", ArrowRight: "n", ArrowLeft: "p" };

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
  if (event.key === "Escape") {
    event.target.blur?.();
    toggleHelp(true);
    return;
  }
  if (typing) return;
  const key = SAME[event.key] || event.key;
  if (byId("viewer").hidden && !["o", "t", "?"].includes(key)) return;
  const place = /^[1-9]$/.test(key) ? Number(key) - 1 : -1;
  if (place >= 0) {
    const button = byId("filters").children[place];
    if (button && !button.disabled) button.click();
  } else if (KEYS[key] && INDEX.runs.length) KEYS[key]();
  else return;
  event.preventDefault();
}

function toggleHelp(close = false) {
  byId("help").hidden = close || !byId("help").hidden;
}

// ---------------------------------------------------------------- light and dark
function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  for (const source of document.querySelectorAll("picture source")) {
    source.media = name ? (name === "dark" ? "all" : "not all") : "(prefers-color-scheme: dark)";
  }
  byId("theme").textContent = { "": "◐ system", light: "☀ light", dark: "☾ dark" }[name];
  try {
    localStorage.setItem("sr1-theme", name);
  } catch {
    // a page of file:// may have no storage
  }
}

function nextTheme() {
  setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme || "") + 1) % THEMES.length]);
}

function begin() {
  let theme = "";
  try {
    theme = localStorage.getItem("sr1-theme") || "";
  } catch {
    theme = "";
  }
  setTheme(THEMES.includes(theme) ? theme : "");
  byId("theme").addEventListener("click", nextTheme);
  if (INDEX.runs.length) {
    byId("to-viewer").href = address({ run: INDEX.runs[0].name });
    byId("run").addEventListener("change", (event) => change({ run: event.target.value, step: "", sample: "" }));
    byId("step").addEventListener("change", (event) => change({ step: event.target.value, sample: "" }));
    byId("sort").addEventListener("change", (event) => change({ sort: event.target.value, sample: "" }));
    byId("order").addEventListener("click", () => change({ down: !state.down, sample: "" }));
    byId("search").addEventListener("input", (event) => change({ search: event.target.value }));
    byId("colour").addEventListener("change", (event) => setColour(event.target.value));
    byId("list").addEventListener("scroll", drawRows);
    byId("help-button").addEventListener("click", () => toggleHelp());
    byId("help").addEventListener("click", () => toggleHelp(true));
    window.addEventListener("resize", drawRows);
  }
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", route);
  route();
  document.documentElement.dataset.ready = "yes";
}

begin();
