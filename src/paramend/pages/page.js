"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const { paths, sizes, groups, group, columns, histograms, separator } = data;
const ROW = 26;

// Colours that people with colour vision deficiency can distinguish (Okabe and Ito); groups also have textures.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#8a8a8a"];
const RAMP = ["#fde725", "#7ad151", "#22a884", "#2a788e", "#414487", "#440154"];

// ---- the tree

const root = { name: "all leaves", path: "", kids: new Map(), leaf: -1, size: 0, count: 0, parent: null, depth: 0 };
paths.forEach((path, leaf) => {
  const keys = separator ? path.split(separator) : [path];
  let node = root;
  keys.forEach((key, at) => {
    let next = node.kids.get(key);
    if (!next || (at === keys.length - 1 && next.leaf >= 0)) {
      const name = next ? key + "\u0000" + leaf : key;
      next = { name: key, path: keys.slice(0, at + 1).join(separator), kids: new Map(), leaf: -1, size: 0, count: 0, parent: node, depth: at + 1 };
      node.kids.set(name, next);
    }
    node = next;
  });
  node.leaf = leaf;
});
const leafNodes = new Array(paths.length);
let deepest = 1;
(function measure(node) {
  deepest = Math.max(deepest, node.depth);
  node.list = [...node.kids.values()];
  if (node.leaf >= 0) { node.size = Math.max(sizes[node.leaf], 1); node.count = 1; leafNodes[node.leaf] = node; }
  for (const kid of node.list) { measure(kid); node.size += kid.size; node.count += kid.count; }
})(root);

// ---- what is shown

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
  const many = paths.length === 1 ? "leaf" : "leaves";
  $("count").textContent = `${found.length.toLocaleString("en")} of ${paths.length.toLocaleString("en")} ${many}`;
}

function cell(leaf, column) {
  if (column === "path") return paths[leaf];
  if (column === "group") return groups[group[leaf]];
  return columns[column].values[leaf];
}

function resort() {
  if (state.sort !== null) {
    const sign = state.down ? -1 : 1;
    const value = (leaf) => cell(leaf, state.sort);
    state.shown.sort((a, b) => {
      const x = value(a), y = value(b);
      if (x === y) return a - b;
      if (x === null) return 1;
      if (y === null) return -1;
      return (typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true })) * sign;
    });
  } else state.shown.sort((a, b) => a - b);
  drawRows();
  drawMap();
}

// ---- the table

const heads = [["path", "path"], ...(groups.length ? [["group", data.group_title]] : []), ...columns.map((c, i) => [i, c.name])];
const tracks = heads.map(([key]) => (key === "path" ? "minmax(14rem, 4fr)" : "minmax(6rem, 1fr)")).join(" ");
document.documentElement.style.setProperty("--tracks", tracks);
document.documentElement.style.setProperty("--least", `${14 + 6 * (heads.length - 1)}rem`);
const numeric = (key) => typeof key === "number" && columns[key].kind !== "text";
for (const [key, title] of heads) {
  const button = document.createElement("button");
  button.textContent = title;
  button.title = `Sort by ${title}`;
  if (numeric(key)) button.className = "number";
  button.onclick = () => {
    if (state.sort === key) state.down = !state.down;
    else { state.sort = key; state.down = numeric(key); }
    for (const other of $("head").children) other.removeAttribute("aria-sort");
    button.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    resort();
    $("rows").scrollTop = 0;
  };
  $("head").append(button);
}

function shownAs(value, kind) {
  if (value === null || value === undefined) return "–";
  if (kind === "text" || typeof value === "string") return String(value);
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
    for (const [key] of heads) {
      const span = document.createElement("span");
      const kind = typeof key === "number" ? columns[key].kind : "text";
      span.textContent = shownAs(cell(leaf, key), kind);
      span.title = span.textContent;
      if (kind !== "text") span.className = "number";
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

// ---- the map

const canvas = $("map"), pen = canvas.getContext("2d");
let boxes = [];

function texture(context, index, colour) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const t = tile.getContext("2d");
  t.fillStyle = colour;
  t.fillRect(0, 0, 8, 8);
  t.strokeStyle = t.fillStyle = "rgba(0,0,0,.55)";
  t.lineWidth = 1.2;
  t.beginPath();
  const kind = index % 6;
  if (kind === 1 || kind === 3) { t.moveTo(-1, 9); t.lineTo(9, -1); t.moveTo(-1, 1); t.lineTo(1, -1); t.moveTo(7, 9); t.lineTo(9, 7); }
  if (kind === 2 || kind === 3) { t.moveTo(-1, -1); t.lineTo(9, 9); t.moveTo(-1, 7); t.lineTo(1, 9); t.moveTo(7, -1); t.lineTo(9, 1); }
  if (kind === 4) { t.moveTo(0, 4); t.lineTo(8, 4); }
  t.stroke();
  if (kind === 5) { t.beginPath(); t.arc(4, 4, 1.5, 0, 7); t.fill(); }
  return context.createPattern(tile, "repeat");
}
const fills = groups.map((_, index) => texture(pen, index, COLOURS[index % COLOURS.length]));

function ramp(share) {
  const at = Math.min(RAMP.length - 1.001, Math.max(0, share) * (RAMP.length - 1));
  const [a, b] = [RAMP[Math.floor(at)], RAMP[Math.floor(at) + 1]].map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const part = at - Math.floor(at);
  return `rgb(${a.map((x, i) => Math.round(x + (b[i] - x) * part)).join(" ")})`;
}

let bounds = null;
function scaleOf(column) {
  const found = columns[column].values.filter((v) => typeof v === "number" && Number.isFinite(v)).map(Math.abs);
  let low = Infinity, high = -Infinity;
  for (const value of found) { if (value > 0) low = Math.min(low, value); high = Math.max(high, value); }
  bounds = { low, high, log: low > 0 && high / low > 100 };
}
function share(value) {
  const size = Math.abs(value);
  if (bounds.high <= 0) return 0;
  if (!bounds.log) return size / bounds.high;
  return size <= 0 ? 0 : 0.08 + 0.92 * (Math.log(size) - Math.log(bounds.low)) / (Math.log(bounds.high) - Math.log(bounds.low) || 1);
}

function paint(leaf, style) {
  if (state.colour === "") return groups.length ? fills[group[leaf]] : COLOURS[0];
  const value = columns[state.colour].values[leaf];
  return typeof value === "number" && Number.isFinite(value) ? ramp(share(value)) : style.node;
}

function drawMap() {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const css = getComputedStyle(document.documentElement);
  const style = { node: css.getPropertyValue("--node"), ink: css.getPropertyValue("--ink"), line: css.getPropertyValue("--line"), mark: css.getPropertyValue("--mark") };
  pen.clearRect(0, 0, width, height);
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  boxes = [];
  let depth = 1;
  (function look(node, level) { depth = Math.max(depth, level); if (level < 12) for (const kid of node.list) look(kid, level + 1); })(state.zoom, 1);
  const tier = Math.max(18, Math.min(44, height / (depth + 0.6)));
  (function draw(node, x, w, y) {
    if (w < 0.6) return;
    const leaf = node.leaf >= 0 && !node.list.length;
    const h = leaf ? height - y : tier;
    pen.globalAlpha = leaf && !match[node.leaf] ? 0.12 : 1;
    pen.fillStyle = leaf ? paint(node.leaf, style) : style.node;
    pen.fillRect(x, y, w, h);
    pen.globalAlpha = 1;
    if (w > 3) { pen.strokeStyle = style.line; pen.lineWidth = 0.5; pen.strokeRect(x, y, w, h); }
    boxes.push([node, x, y, w, h]);
    if (w > 34) {
      pen.save();
      pen.beginPath(); pen.rect(x + 2, y, w - 4, h); pen.clip();
      const text = node.name;
      if (leaf) { pen.lineWidth = 3; pen.strokeStyle = "rgba(255,255,255,.8)"; pen.fillStyle = "#111"; pen.strokeText(text, x + 5, y + 11); }
      else pen.fillStyle = style.ink;
      pen.fillText(text, x + 5, leaf ? y + 11 : y + h / 2);
      pen.restore();
    }
    let from = x;
    for (const kid of node.list) {
      const part = (w * kid.size) / node.size;
      if (y + tier < height) draw(kid, from, part, y + tier);
      from += part;
    }
  })(state.zoom, 0, width, 0);
  const chosen = boxes.find(([node]) => node === state.at);
  if (chosen) {
    pen.strokeStyle = style.mark; pen.lineWidth = 2.5;
    pen.strokeRect(chosen[1] + 1, chosen[2] + 1, Math.max(chosen[3] - 2, 2), chosen[4] - 2);
  }
}

function nodeAt(event) {
  const box = canvas.getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  let found = null;
  for (const entry of boxes) if (x >= entry[1] && x < entry[1] + entry[3] && y >= entry[2] && y < entry[2] + entry[4]) found = entry[0];
  return found;
}
canvas.addEventListener("click", (event) => {
  const node = nodeAt(event);
  if (!node) return;
  if (node.list.length && node !== state.zoom && node === state.at) zoom(node);
  else choose(node, true);
});
canvas.addEventListener("dblclick", (event) => { const node = nodeAt(event); if (node && node.list.length) zoom(node); });
canvas.addEventListener("mousemove", (event) => { const node = nodeAt(event); canvas.title = node ? `${node.path || "all leaves"}: ${node.size.toLocaleString("en")}` : ""; });
canvas.addEventListener("keydown", (event) => {
  const node = state.at, mates = node.parent && node !== state.zoom ? node.parent.list : [node];
  const place = mates.indexOf(node);
  const to = {
    ArrowLeft: () => mates[place - 1], ArrowRight: () => mates[place + 1],
    ArrowUp: () => (node === state.zoom ? null : node.parent), ArrowDown: () => node.list[0],
  }[event.key];
  if (to) { event.preventDefault(); const next = to(); if (next) choose(next, true); }
  else if (event.key === "Enter" && node.list.length) { event.preventDefault(); zoom(node); }
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
  drawMap();
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
    for (const column of columns) if (column.name !== "parameters") add(column.name, shownAs(column.values[node.leaf], column.kind));
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
    const colour = COLOURS[place];
    svg.append(make("path", { d: line, fill: place ? "none" : colour, "fill-opacity": 0.35, stroke: colour, "stroke-width": 1.6, "stroke-dasharray": place ? "5 3" : "none" }));
    svg.append(make("text", { x: W * 0.5, y: H + 30, "text-anchor": place ? "start" : "end", dx: place ? 8 : -8, style: `fill:${colour}` }, place ? `- - ${name}` : `— ${name}`));
  });
  svg.append(make("text", { x: 0, y: H + 13 }, shownAs(low)), make("text", { x: W, y: H + 13, "text-anchor": "end" }, shownAs(high)));
  svg.append(make("text", { x: W / 2, y: H + 13, "text-anchor": "middle" }, "height: square root of the count"));
  return svg;
}

// ---- the controls

groups.forEach((name, index) => {
  const button = document.createElement("button");
  const chip = document.createElement("canvas");
  chip.width = chip.height = 14;
  const c = chip.getContext("2d");
  c.fillStyle = texture(c, index, COLOURS[index % COLOURS.length]);
  c.fillRect(0, 0, 14, 14);
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
$("colour").onchange = () => {
  state.colour = $("colour").value === "" ? "" : Number($("colour").value);
  if (state.colour !== "") scaleOf(state.colour);
  drawMap();
};
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
new ResizeObserver(() => drawMap()).observe(canvas);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
if (data.colour) { $("colour").value = String(columns.findIndex((c) => c.name === data.colour)); $("colour").onchange(); }
zoom(root);
refilter();
document.documentElement.dataset.ready = "true";
