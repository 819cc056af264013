// The text of a response, cut into its blocks, each token in the colour of what was chosen.

const FULL_SURPRISE = 5; // nats: the strongest colour

// All choices, and of those that cannot be made why.
function colours(set) {
  const found = [{ name: "", title: "none" }];
  const absent = set.absent || {};
  for (const [place, stream] of (set.streams || []).entries()) {
    found.push({ name: `advantage:${stream.name}`, title: `advantage, ${stream.name}`, why: stream.unknown, kind: "advantage", place });
  }
  if ((set.streams || []).length > 1) {
    const unknown = set.streams.filter((stream) => stream.unknown && stream.loss_weight).map((stream) => stream.unknown)[0];
    found.push({ name: "advantage", title: "advantage, all streams by their loss weights", why: unknown, kind: "sum" });
  }
  if ("advantage" in absent) found.push({ name: "advantage", title: INDEX.measures.advantage, why: absent.advantage });
  found.push({ name: "surprise", title: INDEX.measures.surprise, why: absent.surprise, kind: "surprise" });
  for (const [name, title] of Object.entries(set.measures || {})) found.push({ name, title, kind: "measured" });
  for (const name of ["gap", "entropy", "dependency"]) {
    if (name in absent) found.push({ name, title: INDEX.measures[name], why: absent[name] });
  }
  return found;
}

// value of one token; null: no such stream credits it, or it is not known
function tokenValue(response, place, colour, set) {
  if (colour.kind === "surprise") return response.surprise?.[place] ?? null;
  if (colour.kind === "measured") return response.measures?.[colour.name]?.[place] ?? null;
  if (!response.streams || !response.advantages) return null;
  const bits = response.streams[place];
  if (colour.kind === "advantage") return bits & (1 << colour.place) ? (response.advantages[colour.place] ?? null) : null;
  if (colour.kind !== "sum") return null;
  let sum = null;
  for (const [stream, value] of response.advantages.entries()) {
    const weight = set.streams[stream].loss_weight;
    if (!(bits & (1 << stream)) || weight === 0) continue;
    if (!isNumber(value)) return value;
    sum = (sum ?? 0) + weight * value;
  }
  return sum;
}

// the largest of the set, so that colours of its samples compare
function strongest(colour, set, table) {
  if (colour.kind === "surprise") return FULL_SURPRISE;
  if (colour.kind === "measured") return set.strongest?.[colour.name] || 1;
  const names = colour.kind === "advantage" ? [set.streams[colour.place].name] : set.streams.map((stream) => stream.name);
  let most = 0;
  for (const name of names) {
    for (const value of table.advantages[name] || []) if (isNumber(value)) most = Math.max(most, Math.abs(value));
  }
  return most || 1;
}

// what is never below 0 has one colour
const isHeat = (colour) => colour.kind === "surprise" || colour.name === "entropy";

function paint(node, value, colour, most) {
  if (value === null || value === undefined) {
    node.className = "token uncredited";
    return;
  }
  if (!isNumber(value)) {
    node.className = "token broken";
    return;
  }
  const kind = isHeat(colour) ? "heat" : value > 0 ? "gain" : value < 0 ? "loss" : "zero";
  node.className = `token ${kind}`;
  const share = Math.min(1, Math.abs(value) / most);
  if (value !== 0) node.style.setProperty("--strength", `${Math.round(10 + 60 * share)}%`);
}

function tokenTitle(response, place, set) {
  const parts = [`token ${place + 1} of ${response.tokens.length}: ${JSON.stringify(response.tokens[place])}`];
  if (response.surprise) parts.push(`surprise ${shown(response.surprise[place])} nats`);
  for (const [name, title] of Object.entries(set.measures || {})) {
    if (response.measures?.[name]) parts.push(`${title} ${shown(response.measures[name][place], name !== "entropy")} nats`);
  }
  for (const [index, stream] of (set.streams || []).entries()) {
    if (response.streams && response.streams[place] & (1 << index)) parts.push(`${stream.name}: advantage ${shown(response.advantages?.[index], true)}`);
  }
  return parts.join("\n");
}

// [name, start, end) of all of a text, what is outside of blocks without a name
function pieces(text, blocks) {
  const found = [];
  let end = 0;
  for (const [name, start, stop] of blocks || []) {
    if (start > end) found.push(["", end, start]);
    found.push([name, start, stop]);
    end = stop;
  }
  if (end < text.length) found.push(["", end, text.length]);
  return found.length ? found : [["", 0, text.length]];
}

function responseText(response, colour, set, most) {
  const text = response.tokens ? response.tokens.join("") : response.text || "";
  const starts = [];
  let at = 0;
  for (const token of response.tokens || []) {
    starts.push(at);
    at += token.length;
  }
  if (!text) return [el("p", { class: "note", text: "The response is empty." })];
  const parts = [];
  for (const [name, start, end] of pieces(text, response.blocks)) {
    const inside = text.slice(start, end);
    if (!name && !inside.trim() && response.blocks?.length) continue;
    const pre = el("pre", { class: "text" });
    if (!response.tokens || !colour.kind || colour.why) pre.textContent = name ? inside.trim() : inside;
    else addTokens(pre, response, starts, [start, end], colour, set, most);
    const ending = !name && /^\s*<\|\w+\|>\s*$/.test(inside); // the end of the turn, whatever the model calls it
    const kind = name ? `part part-${INDEX.segments[name] ? name : "other"}` : ending ? "part ending" : "part";
    parts.push(el("div", { class: kind }, name ? el("h4", { text: INDEX.segments[name] || name }) : null, pre));
  }
  return parts;
}

function addTokens(pre, response, starts, [start, end], colour, set, most) {
  for (let place = 0; place < starts.length; place += 1) {
    const from = Math.max(starts[place], start);
    const to = Math.min(starts[place] + response.tokens[place].length, end);
    if (from >= to) continue;
    const node = el("span", { text: response.tokens[place].slice(from - starts[place], to - starts[place]), title: tokenTitle(response, place, set) });
    paint(node, tokenValue(response, place, colour, set), colour, most);
    pre.append(node);
  }
}

function legend(colour, most) {
  if (!colour.kind || colour.why) return null;
  const node = el("p", { class: "legend" });
  const swatch = (kind, strength, text) => {
    const span = el("span", { class: `token ${kind}`, text });
    span.style.setProperty("--strength", strength);
    return span;
  };
  if (colour.kind === "surprise") node.append(swatch("heat", "10%", "0"), swatch("heat", "40%", String(FULL_SURPRISE / 2)), swatch("heat", "70%", `${FULL_SURPRISE} nats and more`));
  else if (isHeat(colour)) node.append(swatch("heat", "10%", "0"), swatch("heat", "70%", `${shown(most)} nats`), el("span", { class: "token uncredited", text: "it was not measured" }));
  else {
    const unit = colour.kind === "measured" ? " nats" : "";
    const none = { sum: "no stream credits it", advantage: "the stream does not credit it" }[colour.kind] || "it was not measured";
    node.append(swatch("loss", "70%", shown(-most) + unit), swatch("zero", "0%", "0"), swatch("gain", "70%", shown(most, true) + unit), el("span", { class: "token uncredited", text: none }));
  }
  return node;
}
