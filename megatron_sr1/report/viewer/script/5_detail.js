// One sample: its image beside what was described, thought and answered, what later passes made of it, and its numbers.

const detail = { row: null, group: null };

async function openRow(row) {
  detail.row = row;
  const group = row.table.group[row.index];
  const chunk = await load(`${row.set.chunk}-${row.table.groups.chunk[group]}`);
  if (detail.row !== row) return; // another one was opened meanwhile
  detail.group = chunk.find((one) => one.number === groupOf(row, "number"));
  drawDetail();
}

function drawDetail() {
  const { row, group } = detail;
  if (!row || !group) return;
  const set = row.set;
  const sample = group.samples.find((one) => one.number === row.table.sample[row.index]);
  const colour = colours(set).find((one) => one.name === state.colour && !one.why) || { name: "" };
  const most = colour.kind ? strongest(colour, set, row.table) : 1;
  const [first, ...later] = sample.responses;
  const frame = byId("detail");
  const parts = [
    heading(row, group, sample),
    siblings(row, group),
    el("div", { class: "beside" }, questionPart(group, sample), el("div", { class: "passes" }, legend(colour, most), first ? passPart(first, sample, colour, set, most) : null)),
    el("div", { class: "later" }, ...(later.length ? later.map((one) => passPart(one, sample, colour, set, most)) : [noLater(sample, row)])),
    el("div", { class: "beside even" }, rewardTable(sample, set), advantageTable(sample, set)),
    filterNotes(row),
    overSteps(group),
  ];
  frame.replaceChildren(...parts.filter(Boolean));
}

function heading(row, group, sample) {
  const link = el("a", { href: address({ step: row.set.name, sample: `${group.number}.${sample.number}` }), text: "link to this sample" });
  return el(
    "div",
    { class: "heading" },
    el("h2", { text: `${group.key} #${sample.number}` }),
    el("p", { class: "note" }, `${row.set.title} · prompt ${group.number}${group.source ? ` · ${group.source}` : ""} · ${group.samples.length > 1 ? `one of ${group.samples.length} samples` : "its only sample"} · `, link),
  );
}

// All samples of the prompt, as buttons: which were right, and what they earned in comparison.
function siblings(row, group) {
  if (group.samples.length < 2) return null;
  const buttons = group.samples.map((one) => {
    const right = meanOf(one.rewards.acc);
    const kind = !Number.isFinite(right) ? "" : right >= 0.5 ? " right" : " wrong";
    const values = Object.entries(one.advantages).map(([name, value]) => `${name} ${shown(value, true)}`).join(", ");
    const chosen = one.number === row.table.sample[row.index];
    const text = `#${one.number}${kind ? (kind === " right" ? " ✓" : " ✗") : ""}`;
    return el("button", { class: `sibling${kind}${chosen ? " chosen" : ""}`, text, title: values && `advantages: ${values}`, onclick: () => openSample(row.set, group.number, one.number) });
  });
  return el("div", { class: "siblings", role: "group", "aria-label": "samples of this prompt" }, ...buttons);
}

function questionPart(group, sample) {
  const images = (group.images || []).map((name, place) => {
    const image = el("img", { class: "sample", src: imageAddress(name), alt: `image ${place + 1} of the prompt`, loading: "lazy" });
    return el("a", { href: imageAddress(name), target: "_blank", rel: "noopener" }, image);
  });
  const facts = Object.entries(sample.facts).map(([name, value]) => el("p", { class: "note", text: `${name}: ${value}` }));
  return el(
    "div",
    { class: "question" },
    ...images,
    images.length ? null : el("p", { class: "note", text: `No image: ${group.no_images || "the prompt has none"}.` }),
    el("p", { class: "problem", text: group.problem }),
    el("p", {}, "Correct answer: ", el("b", { text: group.answer })),
    ...facts,
    group.prompt ? el("details", {}, el("summary", { text: "The prompt as the engine was given it" }), el("pre", { class: "text", text: group.prompt })) : null,
  );
}

function passTitle(response) {
  const known = INDEX.passes[response.pass_name];
  const named = response.pass_name.startsWith("control: ") ? `Control of the second pass: ${response.pass_name.slice(9)}` : `Pass ${response.pass_name}`;
  return (known || named) + (response.number ? `, answer ${response.number + 1}` : "");
}

function passPart(response, sample, colour, set, most) {
  const marks = [];
  if (response.right !== undefined && response.right !== null) marks.push(el("span", { class: response.right ? "mark right" : "mark wrong", text: response.right ? "✓ right" : "✗ wrong" }));
  if (response.cut) marks.push(el("span", { class: "mark flag", text: "cut by the token limit" }));
  if (response.num_tokens !== undefined) marks.push(el("span", { class: "mark", text: `${response.num_tokens} tokens` }));
  for (const [name, value] of Object.entries(response.facts)) marks.push(el("span", { class: "mark", text: `${name} ${value}` }));
  const body = responseText(response, colour, set, most);
  const parts = [el("h3", {}, passTitle(response), " ", ...marks)];
  if (response.question) parts.push(el("p", {}, "Asked: ", el("b", { text: response.question[0] }), " Correct answer: ", el("b", { text: response.question[1] })));
  if (response.context !== undefined && response.context !== sample.description) parts.push(el("p", { class: "note", text: `Given in place of the image: ${response.context}` }));
  if (colour.kind && !colour.why && !response.tokens) parts.push(el("p", { class: "note", text: "Its tokens are not known, so they have no colour." }));
  return el("article", { class: "pass" }, ...parts, ...body);
}

function noLater(sample, row) {
  const asked = row.set.streams.some((stream) => stream.pass_name !== "first") || row.table.rewards.acc_vis;
  const why = asked ? (sample.description ? "No later pass was saved." : "No second pass: there is no description to reason from.") : "No second pass: the objective has none.";
  return el("p", { class: "note", text: why });
}

function rewardTable(sample, set) {
  const titles = new Map((set.rewards || []).map((one) => [one.name, one.title]));
  const rows = Object.entries(sample.rewards).map(([name, value]) =>
    el("tr", {}, el("th", { text: titles.get(name) || name, title: name }), el("td", { text: Array.isArray(value) ? value.map((one) => shown(one)).join(", ") : shown(value) })),
  );
  return el("div", {}, el("h3", { text: "Rewards" }), el("table", { class: "numbers" }, el("tbody", {}, ...rows)));
}

function advantageTable(sample, set) {
  const part = el("div", {}, el("h3", { text: "Advantages" }));
  if ("advantage" in set.absent) {
    part.append(el("p", { class: "note", text: `Not known: ${set.absent.advantage}` }));
    return part;
  }
  const rows = set.streams.map((stream) => {
    const value = sample.advantages[stream.name];
    const sign = isNumber(value) ? (value > 0 ? "up" : value < 0 ? "down" : "") : "";
    const how = `${stream.pass_name} pass, ${stream.tokens}, ${stream.rewards}, loss weight ${shown(stream.loss_weight)}`;
    const told = stream.unknown ? `not known: ${stream.unknown}` : how;
    return el("tr", {}, el("th", { text: stream.name }), el("td", { class: sign, text: shown(value, true) }), el("td", { class: "note wide", text: told }));
  });
  part.append(el("table", { class: "numbers" }, el("tbody", {}, ...rows)));
  if (!Object.keys(sample.advantages).length) part.append(el("p", { class: "note", text: "The group is not trained on, so it has none." }));
  return part;
}

function filterNotes(row) {
  const bits = row.table.filters[row.index];
  const found = INDEX.filters.filter((one) => bits & one.bit);
  return found.length ? el("ul", { class: "note" }, ...found.map((one) => el("li", { text: `${one.title}: ${one.meaning}` }))) : null;
}

// The same prompt wherever else the page has it, in this run and in others.
function overSteps(group) {
  const part = el("div", { id: "over-steps" });
  const row = detail.row;
  const bucket = row.table.groups.bucket[row.table.group[row.index]];
  const runs = INDEX.runs.filter((run) => run.buckets.includes(bucket));
  Promise.all(runs.map((run) => load(`${INDEX.stamp}-r${INDEX.runs.indexOf(run)}-p${bucket}`))).then(
    (found) => {
      const own = (keys) => (keys[group.key] || []).filter((entry) => entry[4] === group.asked);
      const entries = found.flatMap((keys, place) => own(keys).map((entry) => [runs[place], ...entry]));
      part.replaceChildren(el("h3", { text: "This prompt over the steps" }), el("div", { class: "scroll" }, stepTable(entries, row.set, group)));
    },
    (error) => part.replaceChildren(el("p", { class: "note", text: error.message })),
  );
  return part;
}

function stepTable(entries, shownSet, group) {
  const names = [...new Set(entries.flatMap((entry) => Object.keys(entry[4])))];
  const sets = INDEX.runs.flatMap((run) => run.sets);
  const titles = new Map(sets.flatMap((set) => (set.rewards || []).map((one) => [one.name, one.title])));
  const several = new Set(entries.map((entry) => entry[0])).size > 1;
  const head = el("tr", {}, el("th", {}), el("th", { text: "samples" }), ...names.map((name) => el("th", { text: titles.get(name) || name, title: name })));
  const rows = entries.map(([run, place, number, count, means]) => {
    const set = run.sets[place];
    const here = set === shownSet && number === group.number;
    const text = several ? `${run.name}, ${set.title}` : set.title;
    const link = el("a", { href: address({ run: run.name, step: set.name, sample: `${number}.0`, filter: [], search: "" }), text });
    return el("tr", { class: here ? "here" : null }, el("th", {}, here ? text : link), el("td", { text: String(count) }), ...names.map((name) => el("td", { text: shown(means[name]) })));
  });
  return el("table", { class: "numbers steps" }, el("thead", {}, head), el("tbody", {}, ...rows));
}
