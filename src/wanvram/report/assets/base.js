// The page's data, words, numbers and elements. Data becomes text nodes only, never HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const MIB = 2 ** 20;
const GIB = 2 ** 30;
const COMPONENTS = ["text_encoder", "image_encoder", "dit", "vae", "prompt_extender"];

function t(key, values = {}) {
  return data.texts[key].replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

// Attributes: class, text, on (events), hidden and plain attributes. Children: elements or strings.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const grouped = (value, digits) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const inMib = (bytes) => grouped(bytes / MIB, 1);
// As units.human: MiB under 10 GiB, GiB above and for whole ones and quarters from 1 GiB on, as they are typed.
const human = (bytes) =>
  Math.abs(bytes) >= 10 * GIB || (Math.abs(bytes) >= GIB && bytes % (GIB / 4) === 0)
    ? `${grouped(bytes / GIB, 2)} GiB`
    : `${inMib(bytes)} MiB`;
const percent = (share) => `${grouped(share * 100, 1)} %`;
const signed = (value, text) => (value > 0 ? "+" : "") + text;

function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(2)} s`;
  if (seconds < 120) return `${seconds.toFixed(1)} s`;
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  const minutes = Math.floor(seconds / 60);
  if (minutes < 120) return `${minutes} min ${two(seconds % 60)} s`;
  return `${grouped(Math.floor(minutes / 60), 0)} h ${two(minutes % 60)} min`;
}

// CSS variable of a component's colour; components the page does not know share one.
const colorName = (component) => `--${COMPONENTS.includes(component) ? component : "other"}`;
const cssColor = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// draw() when the node's width is known and whenever it changes; after the layout, which drawing would disturb.
function onResize(node, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (node.clientWidth === width) return;
    width = node.clientWidth;
    requestAnimationFrame(draw);
  }).observe(node);
}

// What is painted on canvas takes its colours from the theme, and is painted again when that changes.
let painted = [];
const onTheme = (node, draw) => painted.push({ node, draw });

function repaint() {
  painted = painted.filter(({ node }) => node.isConnected);
  painted.forEach(({ draw }) => draw());
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

function section(title, ...children) {
  const heading = el("h2", { text: title });
  return el("section", {}, heading, ...children);
}

const momentName = (label) =>
  label === "peak"
    ? t("moment_peak")
    : label.startsWith("peak of ")
      ? t("moment_of", { stage: label.slice("peak of ".length) })
      : label;

// Text cells that a spreadsheet would run as a formula get an apostrophe.
function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

// columns: names; rows: arrays. The file is made when the link is used.
function csvLink(name, columns, rows) {
  const link = el("a", { class: "csv", href: "#", download: `${name}.csv`, text: t("csv") });
  link.setAttribute("aria-label", t("csv_of", { name }));
  link.addEventListener("click", () => {
    const lines = [columns, ...rows()].map((row) => row.map(csvCell).join(","));
    const url = URL.createObjectURL(new Blob(["\ufeff" + lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
    link.href = url;
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
  });
  return link;
}
