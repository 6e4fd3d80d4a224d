
// ---- what is shown

let ROW = 26;
const lower = paths.map((path) => path.toLowerCase());
const state = { query: "", off: new Set(), colour: "", sort: null, down: false, zoom: root, at: root, shown: [] };
let match = new Uint8Array(paths.length).fill(1);

function refilter() {
  const words = state.query.toLowerCase().trim();
  let fits = () => true;
  if (words.includes("*")) {
    const text = words.split(/\*+/).map((part) => part.replace(/[.+?^${}()|[\]\\]/g, "\\$&")).join(".*");
    const pattern = new RegExp(text);
    fits = (path) => pattern.test(path);
  } else if (words) fits = (path) => path.includes(words);
  const found = [];
  for (let i = 0; i < paths.length; i++) {
    match[i] = fits(lower[i]) && !state.off.has(group[i]) ? 1 : 0;
    if (match[i]) found.push(i);
  }
  state.shown = found;
  resort();
  const [one, many] = { map: ["leaf", "leaves"], bars: ["row", "rows"], arrows: ["layer", "layers"] }[data.chart];
  $("count").textContent = `${found.length.toLocaleString("en")} of ${paths.length.toLocaleString("en")} ${paths.length === 1 ? one : many}`;
}

function cell(leaf, column) {
  if (column === "path") return paths[leaf];
  if (column === "group") return groups[group[leaf]];
  return columns[column].values[leaf];
}

function resort() {
  if (state.sort !== null) {
    const sign = state.down ? -1 : 1;
    const value = (leaf) => { const found = cell(leaf, state.sort); return Number.isNaN(found) ? Infinity : found; };
    state.shown.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === y) return a - b;
      if (x === null) return 1;
      if (y === null) return -1;
      return (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true })) * sign;
    });
  } else state.shown.sort((a, b) => (groups.length && data.chart === "map" ? quiet[group[a]] - quiet[group[b]] : 0) || a - b);
  drawRows();
  drawChart();
}

// ---- the table

const numeric = (key) => typeof key === "number" && columns[key].kind !== "text";
const ruler = document.createElement("canvas").getContext("2d");
ruler.font = getComputedStyle(document.body).font;
const told = [["path", "path"], ...(new Set(group).size > 1 ? [["group", data.group_title]] : []), ...columns.flatMap((c, i) => (c.table ? [[i, c.name]] : []))];
const heads = told.map(([key, title]) => ({ key, title, width: 0 }));
const few = Array.from({ length: Math.min(paths.length, 300) }, (_, at) => Math.floor((at * paths.length) / Math.min(paths.length, 300)));
for (const head of heads) {
  const texts = [head.title, ...few.map((leaf) => (head.key === "path" ? "" : shownCell(leaf, head.key)))];
  const [title, ...others] = texts.map((text) => ruler.measureText(text).width);
  head.width = Math.ceil(Math.max(title * 1.1, Math.min(170, Math.max(0, ...others)))) + 20;
}
const longest = Math.max(0, ...few.map((leaf) => ruler.measureText(paths[leaf]).width));
let lines = 1, fitting = [];  // the columns that there is room for; the others are among the details

function layOut() {
  const width = $("rows").clientWidth;
  let rest = width - Math.max(150, width * 0.34);
  fitting = heads.filter((head) => head.key === "path" || (head.width <= rest && ((rest -= head.width), true)));
  const others = fitting.reduce((sum, head) => sum + (head.key === "path" ? 0 : head.width), 0);
  heads[0].width = width - others;
  lines = width < 560 && longest > heads[0].width - 17 ? 2 : 1;  // of a path
  ROW = lines === 2 ? 44 : 26;
  document.documentElement.style.setProperty("--row", `${ROW}px`);
  document.documentElement.style.setProperty("--tracks", fitting.map((head) => `${head.width}px`).join(" "));
  $("head").replaceChildren(...fitting.map(heading));
  drawRows();
}

function heading({ key, title }) {
  const button = document.createElement("button");
  button.textContent = title;
  button.title = `Sort by ${title}`;
  if (numeric(key)) button.className = "number";
  if (state.sort === key) button.setAttribute("aria-sort", state.down ? "descending" : "ascending");
  button.onclick = () => {
    if (state.sort === key) state.down = !state.down;
    else { state.sort = key; state.down = numeric(key); }
    for (const other of $("head").children) other.removeAttribute("aria-sort");
    button.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    resort();
    $("rows").scrollTop = 0;
  };
  return button;
}

function shownCell(leaf, key) {
  return shownAs(cell(leaf, key), typeof key === "number" ? columns[key].kind : "text");
}

function shownAs(value, kind) {
  if (value === null || value === undefined) return "–";
  if (kind === "text" || Number.isNaN(value)) return String(value);
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || (size < 1e-3 && size > 0) ? value.toExponential(3) : String(Number(value.toPrecision(5)));
}

function drawRows() {
  const box = $("rows"), tall = $("tall");
  tall.style.height = `${state.shown.length * ROW}px`;
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 4);
  const last = Math.min(state.shown.length, first + Math.ceil(box.clientHeight / ROW) + 8);
  tall.replaceChildren();
  for (let place = first; place < last; place++) {
    const leaf = state.shown[place];
    const row = document.createElement("div");
    row.className = "row";
    row.setAttribute("role", "row");
    row.style.top = `${place * ROW}px`;
    row.dataset.leaf = leaf;
    row.setAttribute("aria-selected", String(state.at.leaf === leaf));
    for (const { key, width } of fitting) {
      const span = document.createElement("span");
      span.title = shownCell(leaf, key);
      span.textContent = fitted(span.title, key === "path" && lines === 2 ? 1.8 * (width - 17) : width - 17, ruler) || span.title;
      if (numeric(key)) span.className = "number";
      row.append(span);
    }
    row.onclick = () => choose(leafNodes[leaf], false);
    tall.append(row);
  }
}
$("rows").addEventListener("scroll", drawRows);
$("rows").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 15, PageUp: -15 }[event.key];
  if (!step || !state.shown.length) return;
  event.preventDefault();
  const place = state.shown.indexOf(state.at.leaf);
  const next = Math.min(state.shown.length - 1, Math.max(0, place + step));
  choose(leafNodes[state.shown[next]], true);
});

function zoom(node) {
  state.zoom = node;
  choose(node, false);
  $("trail").replaceChildren();
  const trail = [];
  for (let at = node; at; at = at.parent) trail.unshift(at);
  trail.forEach((at, place) => {
    const button = document.createElement("button");
    button.textContent = at.name;
    button.onclick = () => zoom(at);
    $("trail").append(place ? " › " : "", button);
  });
}

// ---- one leaf

function choose(node, scroll) {
  state.at = node;
  if (scroll && node.leaf >= 0) {
    const place = state.shown.indexOf(node.leaf), box = $("rows");
    if (place >= 0 && (place * ROW < box.scrollTop || (place + 1) * ROW > box.scrollTop + box.clientHeight)) box.scrollTop = place * ROW - box.clientHeight / 2;
  }
  drawRows();
  drawChart();
  detail(node);
}

function detail(node) {
  const list = document.createElement("dl");
  const add = (name, value) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name; dd.textContent = value;
    list.append(dt, dd);
  };
  const title = document.createElement("h2");
  title.textContent = node.path || "all leaves";
  if (node.leaf >= 0) {
    if (groups.length) add(data.group_title, groups[group[node.leaf]]);
    add("parameters", sizes[node.leaf].toLocaleString("en"));
    for (const { name, values, kind } of columns) {
      const value = values[node.leaf];
      if (name !== "parameters" && value !== null && value !== "") add(name, shownAs(value, kind));
    }
  } else {
    add("leaves", node.count.toLocaleString("en"));
    add("parameters", node.size.toLocaleString("en"));
    const held = new Array(groups.length).fill(0);
    (function count(at) { if (at.leaf >= 0) held[group[at.leaf]]++; for (const kid of at.list) count(kid); })(node);
    groups.forEach((name, index) => { if (held[index]) add(name, held[index].toLocaleString("en")); });
  }
  $("detail").replaceChildren(title, list);
  const found = node.leaf >= 0 ? histograms[node.leaf] : null;
  if (found) $("detail").append(picture(found));
}

function picture(found) {
  const space = "http://www.w3.org/2000/svg";
  const make = (name, attributes, text) => {
    const element = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const W = 320, H = 150, low = found.edges[0], high = found.edges[1];
  const series = found.after ? [["before", found.before], ["after", found.after]] : [["values", found.before]];
  const most = Math.max(1, ...series.flatMap(([, counts]) => counts));
  const svg = make("svg", { viewBox: `0 0 ${W} ${H + 34}`, role: "img" });
  svg.append(make("title", {}, `Histogram of ${series.map(([name]) => name).join(" and ")}, ${shownAs(low)} to ${shownAs(high)}`));
  series.forEach(([name, counts], place) => {
    const step = W / counts.length;
    const y = (count) => H - (H - 8) * Math.sqrt(count / most);
    let line = `M0 ${H}`;
    counts.forEach((count, at) => { line += ` L${at * step} ${y(count)} L${(at + 1) * step} ${y(count)}`; });
    line += ` L${W} ${H}`;
    const colour = place ? ORANGE : style.scheme === "dark" ? SKY : BLUE;
    svg.append(make("path", { d: line, fill: place ? "none" : colour, "fill-opacity": 0.35, stroke: colour, "stroke-width": 1.6, "stroke-dasharray": place ? "5 3" : "none" }));
    const said = make("text", { x: W * 0.5, y: H + 30, "text-anchor": place ? "start" : "end", dx: place ? 8 : -8 });
    said.append(make("tspan", { style: `fill:${colour}` }, place ? "- - " : "— "), name);
    svg.append(said);
  });
  svg.append(make("text", { x: 0, y: H + 13 }, shownAs(low)), make("text", { x: W, y: H + 13, "text-anchor": "end" }, shownAs(high)));
  svg.append(make("text", { x: W / 2, y: H + 13, "text-anchor": "middle" }, "height: square root of the count"));
  return svg;
}

// ---- the controls

const paintChips = [];
groups.forEach((name, index) => {
  const button = document.createElement("button");
  const chip = document.createElement("canvas");
  chip.width = chip.height = 14;
  const c = chip.getContext("2d");
  paintChips.push(() => { c.fillStyle = texture(c, index); c.fillRect(0, 0, 14, 14); });
  let many = 0;
  for (const one of group) if (one === index) many++;
  button.append(chip, `${name} ${many.toLocaleString("en")}`);
  button.dataset.group = name;
  button.setAttribute("aria-pressed", "true");
  button.onclick = () => {
    if (!state.off.delete(index)) state.off.add(index);
    button.setAttribute("aria-pressed", String(!state.off.has(index)));
    refilter();
  };
  $("groups").append(button);
});
const choices = [["", groups.length ? data.group_title : "plain"], ...columns.flatMap((c, i) => (c.kind === "text" ? [] : [[String(i), c.name]]))];
for (const [value, name] of choices) {
  const option = document.createElement("option");
  option.value = value;
  option.textContent = name;
  $("colour").append(option);
}
$("choice").hidden = choices.length < 2;
function recolour() {
  state.colour = $("colour").value === "" ? "" : Number($("colour").value);
  drawChart();
  for (const paint of paintChips) paint();
  if (state.at.leaf >= 0) detail(state.at);
  $("groups").className = state.colour === "" ? "" : "uncoloured";
  const scale = state.colour === "" ? null : columns[state.colour].scale;
  $("scale").hidden = !scale;
  if (!scale) return;
  $("low").textContent = shownAs(scale.low);
  $("high").textContent = shownAs(scale.high) + (scale.kind === "log" ? " (log scale)" : "");
  $("ramp").style.background = `linear-gradient(to right, ${stopsOf(scale).join(", ")})`;
}
$("colour").onchange = recolour;
let timer = 0;
$("search").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(() => { state.query = $("search").value; refilter(); $("rows").scrollTop = 0; }, paths.length > 20000 ? 120 : 0);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== $("search")) { event.preventDefault(); $("search").focus(); }
  if (event.key === "Escape") {
    if (document.activeElement === $("search") && $("search").value) { $("search").value = ""; state.query = ""; refilter(); }
    else if (state.zoom.parent) zoom(state.zoom.parent);
  }
});
const home = columns.findIndex((column) => column.name === data.colour);
if (home >= 0) $("colour").value = String(home);
document.documentElement.dataset.chart = data.chart;
$("what").textContent = data.chart === "bars" ? "Bars" : "Colour";
canvas.setAttribute("aria-label", `${CHARTS[data.chart].name}. Arrow keys move${data.chart === "map" ? ", Enter zooms in, Escape zooms out" : ""}.`);
recolour();
zoom(root);
refilter();
new ResizeObserver(() => { layOut(); drawChart(); }).observe($("rows"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
layOut();
document.documentElement.dataset.ready = "true";
