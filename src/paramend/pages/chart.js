"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const { paths, sizes, groups, group, columns, histograms, separator, ends, links } = data;
const quiet = data.styles.map(([colour]) => !colour);
const NUMBERS = { NaN, Infinity, "-Infinity": -Infinity };
for (const column of columns) if (column.kind !== "text") column.values = column.values.map((v) => (v in NUMBERS ? NUMBERS[v] : v));

// ---- the tree

const root = { name: "all leaves", path: "", kids: new Map(), leaf: -1, size: 0, count: 0, parent: null };
const leafNodes = new Array(paths.length);
paths.forEach((path, leaf) => {
  const keys = separator ? path.split(separator) : [path];
  let node = root;
  keys.forEach((key, at) => {
    let next = node.kids.get(key);
    if (!next || (at === keys.length - 1 && next.leaf >= 0)) {
      const name = next ? key + "\u0000" + leaf : key;
      next = { name: key, path: keys.slice(0, at + 1).join(separator), kids: new Map(), leaf: -1, size: 0, count: 0, parent: node };
      node.kids.set(name, next);
    }
    node = next;
  });
  node.leaf = leaf;
});
(function measure(node) {
  node.list = [...node.kids.values()];
  if (node.leaf >= 0) { node.size = Math.max(sizes[node.leaf], 1); node.count = 1; leafNodes[node.leaf] = node; }
  for (const kid of node.list) { measure(kid); node.size += kid.size; node.count += kid.count; }
})(root);

// ---- colours

const [RED, BLUE, ORANGE, SKY] = ["#d55e00", "#0072b2", "#e69f00", "#56b4e9"];
const RAMP = ["#fde725", "#7ad151", "#22a884", "#2a788e", "#414487", "#440154"];
let style = {};

function readStyle() {
  const css = getComputedStyle(document.documentElement);
  style = Object.fromEntries(["node", "quiet", "ink", "line", "paper", "dim", "scheme"].map((name) => [name, css.getPropertyValue(`--${name}`).trim()]));
  style.ramp = style.scheme === "dark" ? [...RAMP].reverse() : RAMP;  // what is large stands out from the paper
  style.signed = [BLUE, style.quiet, RED];
  style.fills = groups.map((_, index) => texture(pen, index));
}

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
function ink(hex) {  // black or white, whichever can be read on it
  const [r, g, b] = channels(hex).map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
}
function mixed(stops, share) {
  const at = Math.min(stops.length - 1.001, share * (stops.length - 1));
  const [a, b] = [stops[Math.floor(at)], stops[Math.floor(at) + 1]].map(channels);
  return "#" + a.map((x, i) => Math.round(x + (b[i] - x) * (at % 1)).toString(16).padStart(2, "0")).join("");
}

function share(scale, value) {  // where it lies on a scale, from 0 to 1
  const of = scale.kind === "log" ? Math.log : (x) => x;
  const found = (of(Math.max(value, scale.kind === "log" ? scale.low : -Infinity)) - of(scale.low)) / (of(scale.high) - of(scale.low) || 1);
  return Number.isNaN(found) ? 1 : Math.min(1, Math.max(0, found));
}
const stopsOf = (scale) => (scale.kind === "signed" ? style.signed : style.ramp);
const groupColour = (index) => data.styles[index][0] || style.quiet;

function colourOf(leaf) {
  if (state.colour === "") return groups.length ? groupColour(group[leaf]) : BLUE;
  const { scale, values } = columns[state.colour], value = values[leaf];
  return value === null || !scale ? style.node : mixed(stopsOf(scale), share(scale, value));
}
function loudness(leaf) {  // of leaves too narrow to draw, the loudest is seen
  if (!match[leaf]) return -1;
  if (state.colour === "") return groups.length && !quiet[group[leaf]] ? groups.length - group[leaf] : 0;
  const { scale, values } = columns[state.colour], value = values[leaf];
  return value === null || !scale ? 0 : scale.kind === "signed" ? Math.abs(share(scale, value) - 0.5) * 2 : share(scale, value);
}

function texture(context, index) {
  const kind = data.styles[index][1];
  if (kind === 0) return groupColour(index);
  const tile = document.createElement("canvas");
  tile.width = tile.height = 8;
  const t = tile.getContext("2d");
  t.fillStyle = groupColour(index);
  t.fillRect(0, 0, 8, 8);
  t.strokeStyle = t.fillStyle = `${ink(groupColour(index))}8c`;
  t.lineWidth = 1.2;
  t.beginPath();
  if (kind === 1 || kind === 3) { t.moveTo(-1, 9); t.lineTo(9, -1); t.moveTo(-1, 1); t.lineTo(1, -1); t.moveTo(7, 9); t.lineTo(9, 7); }
  if (kind === 2 || kind === 3) { t.moveTo(-1, -1); t.lineTo(9, 9); t.moveTo(-1, 7); t.lineTo(1, 9); t.moveTo(7, -1); t.lineTo(9, 1); }
  if (kind === 4) { t.moveTo(0, 4); t.lineTo(8, 4); }
  t.stroke();
  if (kind === 5) { t.beginPath(); t.arc(4, 4, 1.5, 0, 7); t.fill(); }
  return context.createPattern(tile, "repeat");
}

// ---- pens

const canvas = $("map"), pen = canvas.getContext("2d");
let boxes = [];  // what was drawn where: [node, x, y, width, height]

function fitted(text, width, tool) {  // cut in the middle; "" if too little would be left
  if (tool.measureText(text).width <= width) return text;
  const letters = [...text];
  const cut = (many) => letters.slice(0, many >> 1).join("") + "…" + letters.slice(letters.length - many + (many >> 1)).join("");
  let low = 3, high = letters.length - 1;
  while (low < high) {
    const many = (low + high + 1) >> 1;
    if (tool.measureText(cut(many)).width <= width) low = many; else high = many - 1;
  }
  return low > 3 ? cut(low) : "";
}
function write(text, x, y, width, colour, on) {  // `on`: the colour below, which hides a texture
  const said = fitted(text, width, pen);
  if (on && said) { pen.fillStyle = on; pen.fillRect(x - 2, y - 7, pen.measureText(said).width + 4, 14); }
  pen.fillStyle = colour;
  pen.fillText(said, x, y);
}
function drawLeaf(node, x, y, w, h) {
  pen.globalAlpha = match[node.leaf] ? 1 : 0.12;
  pen.fillStyle = state.colour === "" && groups.length ? style.fills[group[node.leaf]] : colourOf(node.leaf);
  pen.fillRect(x, y, w, h);
  pen.globalAlpha = 1;
  if (w > 3) { pen.strokeStyle = style.line; pen.lineWidth = 0.5; pen.strokeRect(x, y, w, h); }
  boxes.push([node, x, y, w, h]);
}
const writeOn = (leaf, text, x, y, width) => { if (match[leaf]) write(text, x, y, width, ink(colourOf(leaf)), colourOf(leaf)); };

// ---- the charts

function drawMap(width, height) {
  let depth = 1;
  (function look(node, level) { depth = Math.max(depth, level); if (level < 12) for (const kid of node.list) look(kid, level + 1); })(state.zoom, 1);
  const tier = Math.max(18, Math.min(44, height / (depth + 0.6)));
  const loudest = (node) => node.list.map(loudest).concat(node.leaf >= 0 ? [node] : []).reduce((a, b) => (loudness(b.leaf) > loudness(a.leaf) ? b : a));
  (function draw(node, x, w, y) {
    if (node.leaf >= 0 && !node.list.length) {
      drawLeaf(node, x, y, w, height - y);
      writeOn(node.leaf, node.name, x + 5, y + 11, w - 8);
      return;
    }
    pen.fillStyle = style.node;
    pen.fillRect(x, y, w, tier);
    if (w > 3) { pen.strokeStyle = style.line; pen.lineWidth = 0.5; pen.strokeRect(x, y, w, tier); }
    boxes.push([node, x, y, w, tier]);
    write(node.name, x + 5, y + tier / 2, w - 8, style.ink);
    if (y + tier >= height) return;
    let from = x, narrow = [];
    const flush = (to) => { if (narrow.length) drawLeaf(narrow.map(loudest).reduce((a, b) => (loudness(b.leaf) > loudness(a.leaf) ? b : a)), from, y + tier, to - from, height - y - tier); narrow = []; from = to; };
    let at = x;
    for (const kid of node.list) {
      const part = (w * kid.size) / node.size;
      if (part >= 1.5) { flush(at); draw(kid, at, part, y + tier); from = at + part; } else narrow.push(kid);
      at += part;
      if (at - from >= 1.5) flush(at);
    }
    flush(x + w);
  })(state.zoom, 0, width, 0);
}

function drawBars(width, height, plan) {
  const { row, label, cell, singles, pairs, bars } = plan;
  const column = barColumn();
  const known = bars.map((leaf) => column.values[leaf]).filter(Number.isFinite);
  const low = Math.min(0, ...known), high = Math.max(0, ...known), end = width - 76;
  const place = (value) => label + (end - label) * ((value - low) / (high - low || 1));
  bars.forEach((leaf, at) => {
    const value = column.values[leaf], y = at * row, x = place(0), to = Number.isFinite(value) ? place(value) : x;
    drawLeaf(leafNodes[leaf], Math.min(x, to), y + 2, Math.max(Math.abs(to - x), 1), row - 4);
    boxes[boxes.length - 1] = [leafNodes[leaf], 0, y, width, row];
    if (row < 11) return;
    write(paths[leaf], 4, y + row / 2, label - 12, style.ink);
    write(shownAs(value), end + 6, y + row / 2, 70, style.dim);
  });
  pen.fillStyle = style.dim;
  pen.fillRect(place(0) - 0.5, 0, 1, bars.length * row);
  if (!pairs.length) return;
  const top = height - cell * ends.length - 2;
  const put = (leaf, i, j) => {
    const x = label + j * cell, y = top + i * cell, value = column.values[leaf];
    drawLeaf(leafNodes[leaf], x, y, cell, cell);
    if (value !== null && cell >= 26) writeOn(leaf, String(Number(Number(value).toPrecision(2))), x + 3, y + cell / 2, cell - 5);
  };
  for (const leaf of singles) put(leaf, links[leaf][0], links[leaf][0]);
  for (const leaf of pairs) { const [i, j] = links[leaf]; put(leaf, i, j); put(leaf, j, i); }
  write(`pairs: ${column.name}`, 4, top - 10, label - 12, style.dim);
  if (cell < 11) return;
  ends.forEach((name, at) => {
    write(name, 4, top + (at + 0.5) * cell, label - 12, style.ink);
    pen.save();
    pen.translate(label + (at + 0.5) * cell, top - 6);
    pen.rotate(-Math.PI / 2);
    write(name, 0, 0, plan.head - 10, style.ink);
    pen.restore();
  });
}
const barColumn = () => columns[state.colour === "" ? home : state.colour];
function planBars(width) {
  const [singles, pairs] = [1, 2].map((many) => [...links.keys()].filter((leaf) => links[leaf].length === many));
  const bars = singles.filter((leaf) => barColumn().values[leaf] !== null);
  const longest = Math.max(0, ...ends.map((name) => pen.measureText(name).width)) + 16;
  const label = Math.min(longest, width * 0.36), head = Math.min(longest, 110);
  const row = Math.max(2, Math.min(24, 3000 / bars.length));
  const cell = Math.min(44, (width - label - 2) / ends.length);
  return { row, label, cell, head, singles, pairs, bars, height: row * bars.length + (pairs.length ? head + 14 + cell * ends.length : 0) };
}

function drawArrows(width, height) {
  const wide = Math.min(300, width * 0.36), right = width - wide;
  const [old, now] = [height / ends.length, height / paths.length];
  const used = new Set(links.flat());
  ends.forEach((name, at) => {
    pen.fillStyle = style.node;
    if (used.has(at)) pen.fillRect(0, at * old + 1, wide, old - 2);
    if (old >= 11) write(used.has(at) ? name : `${name} dropped`, 6, (at + 0.5) * old, wide - 10, used.has(at) ? style.ink : style.dim);
  });
  paths.forEach((name, leaf) => {
    const said = groups[group[leaf]], [from, to] = [(links[leaf][0] + 0.5) * old, (leaf + 0.5) * now];
    pen.strokeStyle = quiet[group[leaf]] ? style.dim : groupColour(group[leaf]);
    pen.lineWidth = quiet[group[leaf]] ? 1 : 2;
    pen.globalAlpha = match[leaf] ? 1 : 0.12;
    pen.setLineDash(said === "identity" ? [5, 4] : []);
    pen.beginPath(); pen.moveTo(wide, from); pen.bezierCurveTo(width / 2, from, width / 2, to, right - 7, to); pen.stroke();
    pen.setLineDash([]);
    pen.beginPath(); pen.moveTo(right - 7, to - 4); pen.lineTo(right - 1, to); pen.lineTo(right - 7, to + 4); pen.stroke();
    drawLeaf(leafNodes[leaf], right, leaf * now + 1, wide, now - 2);
    if (now < 12) return;
    const note = pen.measureText(said).width, room = wide - note - 24;
    if (pen.measureText(name).width <= room) writeOn(leaf, said, width - note - 6, to, note);
    writeOn(leaf, name, right + 6, to, wide - 10);
  });
}

const CHARTS = {
  map: { name: "Tree of leaves, as wide as they are large", plan: () => ({ height: 300 }), draw: drawMap },
  bars: { name: "A bar for each, and a matrix of pairs", plan: planBars, draw: drawBars },
  arrows: { name: "Old layers, and the new layers made of them", plan: () => ({ height: Math.max(ends.length, paths.length) * Math.max(2, Math.min(28, 3000 / paths.length)) }), draw: drawArrows },
};

function drawChart() {
  readStyle();
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  const font = () => { pen.font = "11px system-ui, sans-serif"; pen.textBaseline = "middle"; };
  font();
  const plan = CHARTS[data.chart].plan(width), height = Math.max(plan.height, 40);
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  font();
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  boxes = [];
  CHARTS[data.chart].draw(width, height, plan);
  for (const [node, x, y, w, h] of boxes) {
    if (node !== state.at) continue;
    for (const [colour, wide] of [[style.paper, 5], [style.ink, 2.5]]) { pen.strokeStyle = colour; pen.lineWidth = wide; pen.strokeRect(x + 1.5, y + 1.5, Math.max(w - 3, 1), h - 3); }
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
  const place = mates.indexOf(node), list = data.chart !== "map" && node !== root;
  const to = {
    ArrowLeft: () => mates[place - 1], ArrowRight: () => mates[place + 1],
    ArrowUp: () => (list ? mates[place - 1] : node === state.zoom ? null : node.parent),
    ArrowDown: () => (list ? mates[place + 1] : node.list[0]),
  }[event.key];
  if (to) { event.preventDefault(); const next = to(); if (next) choose(next, true); }
  else if (event.key === "Enter" && node.list.length) { event.preventDefault(); zoom(node); }
});
