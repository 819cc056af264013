// What the address says: #run=...&step=...&sample=<prompt>.<sample>, and how the list and the tokens are shown.

const state = { run: "", step: "", sample: "", filter: [], sort: "", down: false, search: "", colour: "" };
const ALL = "all";

function readAddress() {
  const found = new URLSearchParams(location.hash.slice(1));
  if (!found.has("run")) return false;
  state.run = found.get("run");
  state.step = found.get("step") || "";
  state.sample = found.get("sample") || "";
  state.filter = (found.get("filter") || "").split(",").filter((name) => INDEX.filters.some((one) => one.name === name));
  state.sort = found.get("sort") || "";
  state.down = found.get("order") === "down";
  state.search = found.get("search") || "";
  state.colour = found.get("colour") || "";
  return true;
}

function address(changes = {}) {
  const wanted = { ...state, ...changes };
  const found = new URLSearchParams({ run: wanted.run, step: wanted.step });
  if (wanted.sample) found.set("sample", wanted.sample);
  if (wanted.filter.length) found.set("filter", wanted.filter.join(","));
  if (wanted.sort) found.set("sort", wanted.sort);
  if (wanted.down) found.set("order", "down");
  if (wanted.search) found.set("search", wanted.search);
  if (wanted.colour) found.set("colour", wanted.colour);
  return `#${found}`;
}

function writeAddress() {
  history.replaceState(null, "", address());
}

const theRun = () => INDEX.runs.find((run) => run.name === state.run);
const theSet = () => theRun()?.sets.find((set) => set.name === state.step);
