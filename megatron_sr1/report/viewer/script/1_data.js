// Data of the page: blocks inside it, or scripts beside it that a page of file:// can load. Texts of models and of data
// become text nodes, never markup.

const block = (name) => document.querySelector(`script[type="application/json"][data-chunk="${name}"]`);
const INDEX = JSON.parse(block("index").textContent);
const waiting = new Map(); // name -> {promise, take, refuse}
const KEPT = 40; // chunks at a time
const DIGITS = 3;

window.sr1Chunk = (name, value) => {
  const found = waiting.get(name);
  if (found) found.take(value);
};

function load(name) {
  const known = waiting.get(name);
  if (known) {
    waiting.delete(name); // to the end: the oldest go first
    waiting.set(name, known);
    return known.promise;
  }
  const found = {};
  found.promise = new Promise((take, refuse) => Object.assign(found, { take, refuse }));
  waiting.set(name, found);
  found.promise.then(() => (found.here = true)).catch(() => {}); // whoever asked is told
  for (const [old, other] of waiting) {
    if (waiting.size <= KEPT) break;
    if (other.here) waiting.delete(old); // what is on its way is looked for by its name
  }
  const inside = block(name);
  if (inside) found.take(JSON.parse(inside.textContent));
  else if (INDEX.folder) fetchBeside(name, found);
  else refuse(name, found);
  return found.promise;
}

function fetchBeside(name, found) {
  const script = document.createElement("script");
  script.src = `${encodeURIComponent(INDEX.folder)}/${name}.js`;
  script.onload = () => script.remove();
  script.onerror = () => {
    script.remove();
    refuse(name, found);
  };
  document.head.append(script);
}

function refuse(name, found) {
  waiting.delete(name);
  found.refuse(new Error(`${INDEX.folder || "the page"} has no ${name}: reload the page, keep the folder beside it, or write the report again.`));
}

let folded = null;
function imageAddress(name) {
  if (INDEX.folder) return `${encodeURIComponent(INDEX.folder)}/images/${name}`;
  folded ??= JSON.parse(block("images").textContent);
  return folded[name] || "";
}

// ---------------------------------------------------------------- elements and numbers
function el(tag, fields = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(fields)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

const isNumber = (value) => typeof value === "number";

// a number that is not finite is a text in the data, and is shown as it is called
function shown(value, signed = false) {
  if (value === null || value === undefined) return "–";
  if (!isNumber(value)) return String(value);
  const text = Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(DIGITS)));
  return signed && value > 0 ? `+${text}` : text.replace("-", "−");
}

function meanOf(value) {
  if (!Array.isArray(value)) return value;
  const numbers = value.filter(isNumber);
  if (numbers.length < value.length) return value.find((one) => !isNumber(one));
  return numbers.length ? numbers.reduce((sum, one) => sum + one, 0) / numbers.length : null;
}
