// Tables: sortable by every column, with a caption and a CSV of the raw values.

const SHOW = {
  text: (value) => value,
  mib: inMib,
  count: (value) => grouped(value, 0),
  percent,
  seconds: duration,
  delta: (value) => signed(value, inMib(value)),
  change: (value) => signed(value, percent(value)),
  error: (value) => signed(value, inMib(value)),
  ratio: (value) => signed(value, `${grouped(value * 100, 2)} %`),
};
const UNIT = { mib: " MiB", delta: " MiB", error: " MiB" };

const SEARCHED = 4; // rows from which a table has a search

// columns: [{key, label, type, node?, value?, names?, rises?}] where node(row) makes a control instead of text, which sorts by
// value(row), names may break in two lines, and rises sorts the least first; rows: objects by key.
// titled: the heading above says the same as the caption, which is then for screen readers only. dense: many columns.
function dataTable({ caption, columns, rows, file, limit = Infinity, titled = false, dense = false }) {
  const body = el("tbody");
  const heads = columns.map((column) => headCell(column, () => sortBy(column)));
  let [order, shown, found] = [null, limit, rows];

  function sortBy(column) {
    const same = order?.column === column;
    order = { column, descending: same ? !order.descending : column.type !== "text" && !column.rises };
    heads.forEach((head, i) => {
      if (columns[i] !== column) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", order.descending ? "descending" : "ascending");
    });
    fill();
  }

  const more = el("button", { type: "button", class: "more", text: t("all_rows", { count: rows.length }) });
  more.addEventListener("click", () => {
    shown = Infinity;
    fill();
  });

  function fill() {
    const sorted = order ? [...found].sort(ordering(order)) : found;
    // What was searched for is shown whole.
    const count = found === rows ? shown : Infinity;
    body.replaceChildren(...sorted.slice(0, count).map((row) => bodyRow(columns, row)));
    more.hidden = found.length <= count;
  }

  const search = searchField(caption, (matches) => {
    found = matches ? rows.filter((row) => matches(columns.map((column) => cellText(column, row) ?? "").join("\n"))) : rows;
    fill();
    return t("found", { count: found.length, all: rows.length });
  });
  fill();
  const values = columns.filter((column) => !column.node);
  const link = csvLink(file, values.map((c) => c.key), () => rows.map((row) => values.map((c) => row[c.key])));
  const table = el("table", {}, el("caption", { text: caption, class: titled ? "unseen" : null }), el("thead", {}, el("tr", {}, ...heads)), body);
  const scroll = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
  const tools = el("div", { class: "tools" }, more, link);
  return el("div", { class: dense ? "table dense" : "table" }, rows.length >= SEARCHED ? search : null, scroll, tools);
}

// look(matches) is called with what tells whether a text has every word that was typed, null where none was; it returns what was found.
function searchField(what, look) {
  const said = el("span", { class: "found", role: "status" });
  const input = el("input", { type: "search", placeholder: t("search"), "aria-label": t("search_in", { what }), maxlength: 200 });
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = look(words.length ? (text) => words.every((word) => text.toLowerCase().includes(word)) : null);
    said.textContent = words.length ? text : "";
  });
  return el("span", { class: "search" }, input, said);
}

function headCell(column, sort) {
  const label = column.label + (UNIT[column.type] ?? "");
  const button = el("button", { type: "button", text: label, on: { click: sort } });
  return el("th", { scope: "col", class: column.node || column.type === "text" ? null : "number" }, button);
}

function cellText(column, row) {
  const value = column.node ? null : row[column.key];
  return value === null || value === undefined ? null : String(SHOW[column.type](value));
}

function bodyRow(columns, row) {
  const cells = columns.map((column, i) => {
    if (column.node) return el("td", {}, column.node(row));
    const value = row[column.key];
    const text = cellText(column, row) ?? "–";
    const sign = ["delta", "change"].includes(column.type) && value ? (value > 0 ? " up" : " down") : "";
    const kind = column.type !== "text" ? `number${sign}` : text.length > 40 ? "words" : "word";
    if (i === 0) return el("th", { scope: "row", class: kind }, ...breakable(text));
    return el("td", { class: kind }, ...(column.names ? breakable(text) : [text]));
  });
  const result = el("tr", { class: row.marked ? "marked" : null }, ...cells);
  if (row.component !== undefined && columns[0].swatch) cells[0].prepend(swatch(row.component));
  return result;
}

// Lines break after - and _ of a name, not inside its words.
const breakable = (text) => text.split(/(?<=[-_])/).flatMap((part, i) => (i ? [el("wbr"), part] : [part]));

function swatch(component) {
  const mark = el("span", { class: "swatch", "aria-hidden": "true" });
  mark.style.background = `var(${colorName(component)})`;
  return mark;
}

// A number, also where it stands as text, as the value of a setting does.
const asNumber = (value) => (typeof value === "string" ? (value.trim() && isFinite(value) ? Number(value) : null) : Number(value));

// Numbers by size and before texts. Missing values come last in either direction.
function ordering({ column, descending }) {
  const of = column.value ?? ((row) => row[column.key] ?? null);
  return (a, b) => {
    const [x, y] = [of(a), of(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    const [m, n] = [asNumber(x), asNumber(y)];
    const text = () => (m === null) - (n === null) || x.localeCompare(y, undefined, { numeric: true });
    const result = m !== null && n !== null ? m - n : text();
    return descending ? -result : result;
  };
}

const column = (key, label, type = "text", more = {}) => ({ key, label: t(label), type, ...more });

function stageTable(run) {
  const timed = run.stages.some((stage) => stage.seconds !== null);
  return dataTable({
    caption: t("stages"),
    file: "stages",
    titled: true,
    columns: [
      column("name", "stage", "text", { swatch: true }),
      column("component", "component"),
      column("start_allocated_bytes", "start", "mib"),
      column("peak_allocated_bytes", "peak_allocated", "mib"),
      column("activation_bytes", "activation", "mib"),
      ...(run.cached ? [column("peak_reserved_bytes", "peak_reserved", "mib")] : []),
      column("peak_device_bytes", "peak_device", "mib"),
      ...(run.cached ? [column("fragmentation", "fragmentation", "percent")] : []),
      column("fluctuation_bytes", "fluctuation", "mib"),
      ...(timed ? [column("seconds", "time", "seconds")] : []),
    ],
    rows: run.stages.map((stage) => ({
      name: stage.name,
      component: stage.component,
      start_allocated_bytes: stage.start,
      peak_allocated_bytes: stage.peak.allocated,
      activation_bytes: stage.activation,
      peak_reserved_bytes: stage.peak.reserved,
      peak_device_bytes: stage.peak.device,
      fragmentation: stage.fragmentation,
      fluctuation_bytes: stage.fluctuation,
      seconds: stage.seconds,
      marked: stage.name === run.stage,
    })),
  });
}

function componentTable(run) {
  return dataTable({
    caption: t("components"),
    file: "components",
    titled: true,
    columns: [
      column("component", "component", "text", { swatch: true }),
      column("parameters", "parameters", "count"),
      column("base_bytes", "base", "mib"),
      column("host_bytes", "host", "mib"),
      column("activation_bytes", "activation", "mib"),
    ],
    rows: run.components.map((c) => ({ ...c, component: c.name, marked: c.name === run.component })),
  });
}

function gpuTable(run) {
  return dataTable({
    caption: t("every_gpu"),
    file: "gpus",
    titled: true,
    columns: [
      column("gpus", "gpus"),
      column("allocated_bytes", "peak_allocated", "mib"),
      ...(run.cached ? [column("reserved_bytes", "peak_reserved", "mib")] : []),
      column("device_bytes", "peak_device", "mib"),
      column("communication_bytes", "communication", "mib"),
      column("pinned_bytes", "pinned", "mib"),
      column("exchanged_bytes", "sent", "mib"),
      column("exchange_seconds", "waited", "seconds"),
      column("stage", "peak_in"),
    ],
    rows: run.ranks,
  });
}

function verdict(run) {
  if (run.failure) return t("failed");
  return run.fits === null ? null : t(run.fits ? "fits" : "does_not_fit");
}

function pairTable(settings, caption, file) {
  return dataTable({
    caption,
    titled: true,
    file,
    columns: [column("setting", "setting"), column("value", "value")],
    rows: Object.entries(settings).map(([setting, value]) => ({ setting, value })),
  });
}

function adviceTable(run) {
  return dataTable({
    caption: t("advice_title"),
    file: "advice",
    titled: true,
    columns: [
      column("change", "advice_change"),
      column("saved_bytes", "advice_saved", "mib"),
      column("seconds", "advice_seconds", "seconds"),
    ],
    rows: run.advice,
  });
}

// The same stage may run twice; the second is "decode #2".
function byName(items) {
  const result = new Map();
  for (const item of items) {
    let [name, number] = [item.name, 1];
    while (result.has(name)) name = `${item.name} #${++number}`;
    result.set(name, item);
  }
  return result;
}

// Every figure that two runs have in common or only one has: [figure, a, b].
function figures(a, b) {
  const rows = [];
  const add = (figure, x, y) => {
    if ((x ?? null) !== null || (y ?? null) !== null) rows.push([figure, x ?? null, y ?? null]);
  };
  for (const kind of ["device", "reserved", "allocated"]) {
    add(`${t("whole")}: ${t(`peak_${kind}`)}`, a.peak?.[kind], b.peak?.[kind]);
  }
  const [stagesA, stagesB] = [byName(a.stages), byName(b.stages)];
  for (const kind of ["device", "reserved", "allocated"]) {
    for (const name of new Set([...stagesA.keys(), ...stagesB.keys()])) {
      add(`${name}: ${t(`peak_${kind}`)}`, stagesA.get(name)?.peak[kind], stagesB.get(name)?.peak[kind]);
    }
  }
  const [partsA, partsB] = [byName(a.components), byName(b.components)];
  for (const name of new Set([...partsA.keys(), ...partsB.keys()])) {
    add(`${name}: ${t("base")}`, partsA.get(name)?.base_bytes, partsB.get(name)?.base_bytes);
  }
  return rows;
}

// rows of {figure, a, b, difference, relative}; difference and relative are `of` minus and over the other one.
function comparedRows(pairs, from, to) {
  return pairs.map(([figure, a, b]) => {
    const known = a !== null && b !== null;
    const base = { a, b }[from];
    const difference = known ? { a, b }[to] - base : null;
    return { figure, a, b, difference, relative: known && base ? difference / base : null };
  });
}

// What is compared, and by how much the first figure that both have differs.
function comparedInShort(a, b) {
  const first = comparedRows(figures(a, b), "a", "b").find((row) => row.difference !== null);
  const parts = [`A: ${a.label}`, `B: ${b.label}`];
  if (first) {
    const share = first.relative === null ? "" : ` (${SHOW.change(first.relative)})`;
    parts.push(`${first.figure} ${signed(first.difference, human(first.difference))}${share}`);
  }
  return parts.join(" · ");
}

function comparisonTables(a, b) {
  const table = dataTable({
    caption: `A: ${a.label} · B: ${b.label}`,
    titled: true,
    file: "comparison",
    limit: 9,
    columns: [
      column("figure", "figure"),
      { key: "a", label: "A", type: "mib" },
      { key: "b", label: "B", type: "mib" },
      column("difference", "difference", "delta"),
      column("relative", "relative", "change"),
    ],
    rows: comparedRows(figures(a, b), "a", "b"),
  });
  const keys = [...new Set([...Object.keys(a.settings), ...Object.keys(b.settings)])];
  // A record of an older version lacks the settings that did not exist yet; they are as good as off.
  // Only what the run says itself: a key may be called "constructor".
  const said = (run, key) => (Object.hasOwn(run.settings, key) ? run.settings[key] : null);
  const at = (run, key) => (["null", "false", "[]"].includes(said(run, key)) ? "" : (said(run, key) ?? ""));
  const changed = keys.filter((key) => at(a, key) !== at(b, key));
  // Drawn anew for each run, and no figure depends on it: shown only if nothing else differs.
  const seed = "request.base_seed";
  const others = changed.some((key) => ![seed, "name", "description"].includes(key));
  const different = changed
    .filter((key) => key !== seed || !others)
    .map((setting) => ({ setting, a: said(a, setting), b: said(b, setting) }));
  if (!different.length) return [table, el("p", { text: t("no_difference") })];
  const words = [column("setting", "setting"), { key: "a", label: "A", type: "text" }, { key: "b", label: "B", type: "text" }];
  return [table, dataTable({ caption: t("differing"), file: "differences", columns: words, rows: different })];
}

// One row for each pair: signed errors of the whole run, and the largest of any stage's peaks.
function errorsTable(pairs) {
  const error = (p, m) => ((p ?? null) === null || !m ? null : (p - m) / m);
  const rows = pairs.map(([predicted, measured]) => {
    const stages = comparedRows(figures(predicted, measured), "b", "a").filter((row) => row.relative !== null);
    const worst = stages.reduce((a, b) => (Math.abs(b.relative) > Math.abs(a.relative) ? b : a), { relative: 0 });
    const row = { run: measured.label, step: error(predicted.step_seconds, measured.step_seconds) };
    for (const kind of ["device", "reserved", "allocated"]) row[kind] = error(predicted.peak?.[kind], measured.peak?.[kind]);
    return { ...row, worst: worst.relative, where: worst.figure ?? null };
  });
  return dataTable({
    caption: t("accuracy"),
    file: "errors",
    titled: true,
    columns: [
      column("run", "run"),
      column("device", "peak_device", "ratio"),
      column("reserved", "peak_reserved", "ratio"),
      column("allocated", "peak_allocated", "ratio"),
      column("step", "step", "ratio"),
      column("worst", "worst_stage", "ratio"),
      column("where", "figure"),
    ],
    rows,
  });
}

function accuracyTable(predicted, measured) {
  return dataTable({
    caption: `${t("predicted")}: ${predicted.label} · ${t("measured")}: ${measured.label}`,
    file: "accuracy",
    limit: 9,
    columns: [
      column("figure", "figure"),
      column("a", "predicted", "mib"),
      column("b", "measured", "mib"),
      column("difference", "error", "error"),
      column("relative", "relative", "ratio"),
    ],
    rows: comparedRows(figures(predicted, measured), "b", "a"),
  });
}
