// The list of samples: filtered, sorted, and drawn only where it is in sight.

const ROW_HEIGHT = 50;
const list = { rows: [], tables: new Map(), shown: [], at: -1 };
const byId = (name) => document.getElementById(name);

// Rows of one set, or of all sets of training steps, with what they are found by.
async function loadRows(run) {
  const sets = state.step === ALL ? run.sets.filter((set) => set.kind === "step") : run.sets.filter((set) => set.name === state.step);
  const rows = [];
  for (const set of sets.filter((one) => one.samples)) {
    const table = await load(set.chunk);
    for (let index = 0; index < table.group.length; index += 1) rows.push({ set, table, index });
  }
  return rows;
}

const groupOf = (row, column) => row.table.groups[column][row.table.group[row.index]];
// among those of one set; of several sets with the name of its own in front
const idOf = (row) => `${state.step === ALL ? `${row.set.name}/` : ""}${groupOf(row, "number")}.${row.table.sample[row.index]}`;

function sortKeys(sets) {
  const found = new Map([["", "order of the step"]]);
  for (const set of sets) {
    for (const reward of set.rewards || []) found.set(`reward:${reward.name}`, reward.title);
    for (const stream of set.streams) if (!stream.unknown) found.set(`advantage:${stream.name}`, `advantage, ${stream.name}`);
  }
  found.set("tokens", "length of the first response");
  if (sets.some((set) => !("surprise" in set.absent))) found.set("surprise", "mean surprise of the first response");
  for (const set of sets) {
    for (const [name, title] of Object.entries(set.measures || {})) {
      found.set(`measure:${name}`, name === "gap" ? "largest log-prob gap of a token" : `mean ${title} of the first response`);
    }
  }
  return found;
}

function sortValue(row, key) {
  const [kind, name] = key.split(/:(.*)/s);
  if (kind === "reward") return row.table.rewards[name]?.[row.index] ?? null;
  if (kind === "advantage") return row.table.advantages[name]?.[row.index] ?? null;
  if (kind === "measure") return row.table.measures[name]?.[row.index] ?? null;
  return row.table[kind]?.[row.index] ?? null;
}

function chooseRows() {
  const bits = INDEX.filters.filter((one) => state.filter.includes(one.name)).reduce((sum, one) => sum | one.bit, 0);
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  let rows = list.rows.filter((row) => (row.table.filters[row.index] & bits) === bits);
  if (words.length) {
    rows = rows.filter((row) => {
      const text = ["key", "problem", "answer", "source"].map((column) => groupOf(row, column)).join("\n").toLowerCase();
      return words.every((word) => text.includes(word));
    });
  }
  if (state.sort) {
    const sign = state.down ? -1 : 1;
    const keyed = rows.map((row) => [sortValue(row, state.sort), row]);
    const rank = (value) => (isNumber(value) ? 0 : value === null ? 2 : 1); // what is no number comes last
    keyed.sort((a, b) => rank(a[0]) - rank(b[0]) || (isNumber(a[0]) ? sign * (a[0] - b[0]) : 0));
    rows = keyed.map((pair) => pair[1]);
  } else if (state.down) rows = [...rows].reverse();
  list.shown = rows;
  list.at = state.sample ? rows.findIndex((row) => idOf(row) === state.sample) : -1;
}

function drawList() {
  byId("count").textContent = `${list.shown.length} of ${list.rows.length} samples`;
  byId("height").style.setProperty("height", `${list.shown.length * ROW_HEIGHT}px`);
  drawRows();
}

function drawRows() {
  const frame = byId("list");
  const first = Math.max(0, Math.floor(frame.scrollTop / ROW_HEIGHT) - 4);
  const last = Math.min(list.shown.length, Math.ceil((frame.scrollTop + (frame.clientHeight || 800)) / ROW_HEIGHT) + 4);
  const nodes = [];
  for (let place = first; place < last; place += 1) nodes.push(listRow(place));
  byId("height").replaceChildren(...nodes);
}

function listRow(place) {
  const row = list.shown[place];
  const node = el(
    "div",
    { class: place === list.at ? "row chosen" : "row", role: "option", "aria-selected": place === list.at ? "true" : "false", id: `row-${place}` },
    el("span", { class: "row-name", text: `${groupOf(row, "key")} #${row.table.sample[row.index]}` }),
    el("span", { class: "row-marks" }, ...rowFlags(row)),
    el("span", { class: "row-text", text: (state.step === ALL ? `${row.set.title}: ` : "") + groupOf(row, "problem") }),
    el("span", { class: "row-marks" }, ...rowMarks(row)),
  );
  node.style.setProperty("top", `${place * ROW_HEIGHT}px`);
  node.addEventListener("click", () => openAt(place));
  return node;
}

const MARKS = [["acc", "answer"], ["acc_vis", "description"]];
function rowMarks(row) {
  const marks = [];
  for (const [name, word] of MARKS) {
    const value = row.table.rewards[name]?.[row.index];
    if (value === undefined || value === null) continue;
    const kind = !Number.isFinite(value) ? "" : value >= 0.5 ? " right" : " wrong"; // what is no number is neither
    marks.push(el("span", { class: `mark${kind}`, text: `${{ " right": "✓", " wrong": "✗" }[kind] || "?"} ${word}`, title: `${word}: ${shown(value)}` }));
  }
  return marks;
}

function rowFlags(row) {
  const marks = [];
  const bits = row.table.filters[row.index];
  const short = { leak: "leak", cut: "cut", opposite: "±", dead: "dead", dropped: "dropped", not_finite: "NaN", gap: "gap" };
  for (const filter of INDEX.filters) {
    if (bits & filter.bit && short[filter.name]) marks.push(el("span", { class: "mark flag", text: short[filter.name], title: `${filter.title}: ${filter.meaning}` }));
  }
  if (state.sort && !state.sort.startsWith("reward:acc")) marks.push(el("span", { class: "mark value", text: shown(sortValue(row, state.sort)) }));
  return marks;
}

function intoSight() {
  const frame = byId("list");
  const top = list.at * ROW_HEIGHT;
  if (list.at < 0) return;
  if (top < frame.scrollTop) frame.scrollTop = top;
  else if (top + ROW_HEIGHT > frame.scrollTop + frame.clientHeight) frame.scrollTop = top + ROW_HEIGHT - frame.clientHeight;
}
