"use strict";
// Theme, sorting, one filter for all rows, and a plot of the rows of the table of all runs.

const $ = (id) => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

// Theme: the system's until the button is pressed; remembered where the browser allows it.
const dark = matchMedia("(prefers-color-scheme: dark)");
const memory = (write) => {
  try {
    if (write) localStorage.setItem("kvp-theme", write);
    return localStorage.getItem("kvp-theme");
  } catch {
    return null;
  }
};
const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
function showTheme() {
  $("theme").setAttribute("aria-pressed", isDark());
}
if (memory()) document.documentElement.dataset.theme = memory();
$("theme").addEventListener("click", () => {
  const next = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  memory(next);
  showTheme();
});
dark.addEventListener("change", showTheme);

// Sorting: within the sections of a table; rows without a value stay last.
const valueOf = (row, column) => {
  const cell = row.cells[column];
  return "value" in cell.dataset ? parseFloat(cell.dataset.value) : cell.textContent.trim();
};
const compare = (a, b) =>
  typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
const blank = (value) => value === "" || Number.isNaN(value);
function sort(heading) {
  const up = heading.getAttribute("aria-sort") !== "ascending";
  const table = heading.closest("table");
  for (const other of all("thead th", table)) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  for (const body of table.tBodies) {
    const keyed = all("tr", body).map((row) => [valueOf(row, heading.cellIndex), row]);
    keyed.sort(([a], [b]) => blank(a) - blank(b) || (blank(a) ? 0 : (up ? 1 : -1) * compare(a, b)));
    body.append(...keyed.map(([, row]) => row));
  }
}
for (const heading of all("thead th")) heading.firstChild.addEventListener("click", () => sort(heading));

// Filter: a row stays if it has every word; the plot follows.
function filter() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = all("tbody tr");
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
  const runs = all("#runs tbody tr");
  $("count").textContent = `${runs.filter((row) => !row.hidden).length} of ${runs.length} lines`;
  draw();
}
$("filter").addEventListener("input", filter);

// Plot.
const COLOURS = ["#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"];
const MARKERS = [
  "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z", // circle
  "M-4.5,-4.5h9v9h-9z", // square
  "M0,-5.5L5.5,4.5H-5.5z", // triangle
  "M0,-6L6,0L0,6L-6,0z", // diamond
  "M0,5.5L5.5,-4.5H-5.5z", // triangle down
  "M-2,-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z", // plus
  "M5.5,0L2.75,4.8H-2.75L-5.5,0L-2.75,-4.8H2.75z", // hexagon
];
const STAR = "M0,-7L1.7,-2.3L6.7,-2.2L2.7,0.9L4.1,5.7L0,2.8L-4.1,5.7L-2.7,0.9L-6.7,-2.2L-1.7,-2.3z";
const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [800, 420, 70, 50, 12];

const metrics = all("#runs th[data-metric]").map((th) => ({ name: th.textContent, column: th.cellIndex }));
for (const axis of ["x", "y"]) {
  for (const { name, column } of metrics) $(axis).append(new Option(name, column));
  $(axis).addEventListener("change", draw);
}
const start = (axis, word) => {
  const metric = metrics.find(({ name }) => name.startsWith(word));
  if (metric) $(axis).value = metric.column;
};
start("x", "KV cache (");
start("y", "perplexity");

const series = [...new Set(all("#runs [data-series]").map((row) => row.dataset.series))].filter((s) => s !== "dense");
const look = (name) =>
  name === "dense"
    ? { colour: "var(--ink)", path: STAR }
    : { colour: COLOURS[series.indexOf(name) % COLOURS.length], path: MARKERS[series.indexOf(name) % MARKERS.length] };

function element(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// A scale from values to pixels, logarithmic where the range demands it, and its ticks.
function makeScale(values, from, to) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const log = low > 0 && high >= 8 * low;
  const map = log ? Math.log10 : (v) => v;
  const pad = 0.06 * (map(high) - map(low)) || Math.abs(map(low)) * 0.1 || 1;
  [low, high] = [map(low) - pad, map(high) + pad];
  const at = (value) => from + ((map(value) - low) / (high - low)) * (to - from);
  const ticks = [];
  if (log) {
    for (let e = Math.floor(low); e <= high; e++) for (const m of [1, 3]) ticks.push(m * 10 ** e);
  } else {
    const raw = (high - low) / 6;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((m) => m * power >= raw);
    for (let i = Math.ceil(low / step); i * step <= high; i++) ticks.push(i * step);
  }
  return { at, ticks: ticks.filter((tick) => map(tick) >= low && map(tick) <= high) };
}
const written = (tick) => Number(tick.toPrecision(6)).toLocaleString("en");

function draw() {
  const [x, y] = [Number($("x").value), Number($("y").value)];
  const rows = all("#runs tbody tr[data-series]").filter(
    (row) => !row.hidden && !blank(valueOf(row, x)) && !blank(valueOf(row, y)),
  );
  $("tip").hidden = true;
  if (!rows.length) {
    $("plot").replaceChildren("No run has both numbers.");
    return;
  }
  const [across, up] = [makeScale(rows.map((r) => valueOf(r, x)), LEFT, WIDTH - 12), makeScale(rows.map((r) => valueOf(r, y)), HEIGHT - BOTTOM, TOP)];
  const title = ([axis]) => $(axis).selectedOptions[0].text;
  const shown = ["dense", ...series].filter((name) => rows.some((row) => row.dataset.series === name));
  const wide = 36 + 6.6 * Math.max(...shown.map((name) => name.length)); // of a legend's entry
  const columns = Math.max(1, Math.floor((WIDTH - LEFT) / wide));
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT + 22 * Math.ceil(shown.length / columns)}`, role: "group", "aria-label": `${title("y")} against ${title("x")}` });
  for (const tick of across.ticks) {
    svg.append(element("line", { class: "grid", x1: across.at(tick), x2: across.at(tick), y1: TOP, y2: HEIGHT - BOTTOM }));
    svg.append(element("text", { x: across.at(tick), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" }, written(tick)));
  }
  for (const tick of up.ticks) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: WIDTH - 12, y1: up.at(tick), y2: up.at(tick) }));
    svg.append(element("text", { x: LEFT - 8, y: up.at(tick) + 4, "text-anchor": "end" }, written(tick)));
  }
  svg.append(element("path", { class: "axis", fill: "none", d: `M${LEFT},${TOP}V${HEIGHT - BOTTOM}H${WIDTH - 12}` }));
  svg.append(element("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 10, "text-anchor": "middle" }, title("x")));
  svg.append(element("text", { transform: `translate(14 ${(HEIGHT - BOTTOM) / 2}) rotate(-90)`, "text-anchor": "middle" }, title("y")));
  for (const row of rows) {
    const { colour, path } = look(row.dataset.series);
    const fill = row.dataset.tuned === "true" ? colour : "var(--paper)";
    const text = `${row.dataset.label}\n${row.querySelector("a").title}\n${title("x")}: ${row.cells[x].textContent.trim()}\n${title("y")}: ${row.cells[y].textContent.trim()}`;
    const mark = element("path", { class: "point", d: path, stroke: colour, fill, transform: `translate(${across.at(valueOf(row, x))} ${up.at(valueOf(row, y))})` });
    const link = element("a", { href: row.querySelector("a").getAttribute("href"), "aria-label": text.replaceAll("\n", ", ") }, mark);
    const tell = (told) => () => tip(told && { text, mark }, row);
    for (const [event, told] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) link.addEventListener(event, tell(told));
    svg.append(link);
  }
  shown.forEach((name, i) => {
    const [left, top] = [LEFT + 8 + wide * (i % columns), HEIGHT + 8 + 22 * Math.floor(i / columns)];
    const { colour, path } = look(name);
    svg.append(element("path", { class: "point", d: path, stroke: colour, fill: colour, transform: `translate(${left} ${top})` }));
    svg.append(element("text", { x: left + 12, y: top + 4 }, name));
  });
  $("plot").replaceChildren(svg);
}

// What the pointer or the focus is on: in words, and its row in the table.
function tip(point, row) {
  row.classList.toggle("hit", Boolean(point));
  $("tip").hidden = !point;
  if (!point) return;
  $("tip").textContent = point.text;
  const box = point.mark.getBoundingClientRect();
  const left = Math.min(box.right + 8, innerWidth - $("tip").offsetWidth - 8);
  $("tip").style.left = `${left + scrollX}px`;
  $("tip").style.top = `${box.bottom + 8 + scrollY}px`;
}

showTheme();
filter();
