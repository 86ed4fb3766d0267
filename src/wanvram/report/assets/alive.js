// What was alive at a moment: a treemap of the groups of equal tensors, the allocator's segments with their holes.

const FIELDS = ["bytes", "count", "component", "stage", "module", "operation", "shape", "dtype"];

// Rectangles of areas proportional to `values` (largest first, all > 0) in a box, as square as a greedy row allows.
function squarify(values, box) {
  const scale = (box.w * box.h) / values.reduce((sum, value) => sum + value, 0);
  const rectangles = [];
  let { x, y, w, h } = box;
  for (let i = 0; i < values.length; ) {
    const side = Math.min(w, h);
    const row = [];
    let area = 0;
    let worst = Infinity;
    while (i + row.length < values.length) {
      const next = values[i + row.length] * scale;
      const grown = area + next;
      const ratio = Math.max((side * side * (row[0] ?? next)) / grown ** 2, grown ** 2 / (side * side * next));
      if (row.length && ratio > worst) break;
      row.push(next);
      area = grown;
      worst = ratio;
    }
    const thick = area / side;
    let offset = 0;
    for (const part of row) {
      const long = part / thick;
      rectangles.push(w >= h ? { x, y: y + offset, w: thick, h: long } : { x: x + offset, y, w: long, h: thick });
      offset += long;
    }
    if (w >= h) [x, w] = [x + thick, Math.max(0, w - thick)];
    else [y, h] = [y + thick, Math.max(0, h - thick)];
    i += row.length;
  }
  return rectangles;
}

const unpack = (group) => Object.fromEntries(FIELDS.map((field, i) => [field, group[i]]));
// Without what only PyTorch knows of it: aten.empty.memory_format and aten::empty are "empty".
const plainOperation = (name) => name.replace(/^(?:aten|prims|wanvram)(?:\.|::)(\w+)(?:\.\w+)?/, "$1");
const groupName = (group) => (group.operation === "(other)" ? t("other") : group.operation === null ? t("unknown") : plainOperation(group.operation));
const shapeText = (group) => (group.shape ? `[${group.shape.join(", ")}]` : "");

// What it is: weights of whom, else shape and type, and what made it unless that only made room.
function whatIs(group) {
  if (group.operation === "weights" && group.component) return t("weights_of", { component: group.component });
  const shape = NAMES.shape(group);
  return shape ? [shape, /^empty|^new_empty/.test(groupName(group)) ? "" : groupName(group)].filter(Boolean).join(" ") : groupName(group);
}

// What before where.
function describe(group, total) {
  const parts = [
    whatIs(group),
    group.operation === "weights" ? NAMES.shape(group) : "",
    human(group.bytes),
    percent(group.bytes / total),
    group.count > 1 ? `${grouped(group.count, 0)} ×` : "",
    [group.component, group.stage, group.module].filter(Boolean).join(" / "),
  ];
  return parts.filter(Boolean).join(" · ");
}

const NAMES = {
  operation: groupName,
  shape: (group) => [shapeText(group), group.dtype].filter(Boolean).join(" "),
};

// Groups under their component (or stage, module, shape, operation), largest first.
function nested(groups, key) {
  const result = new Map();
  for (const group of groups.filter((g) => g.bytes > 0)) {
    const name = NAMES[key]?.(group) || group[key] || t("other");
    result.set(name, [...(result.get(name) ?? []), group]);
  }
  return [...result]
    .map(([name, members]) => {
      const sum = members.reduce((total, group) => total + group.bytes, 0);
      return { name, sum, members: members.sort((a, b) => b.bytes - a.bytes) };
    })
    .sort((a, b) => b.sum - a.sum);
}

function place(node, { x, y, w, h }) {
  Object.assign(node.style, { left: `${x}px`, top: `${y}px`, width: `${w}px`, height: `${h}px` });
}

// Groups smaller than half a pixel are left out of the picture; the table has them.
function treemap(groups, key) {
  const total = groups.reduce((sum, group) => sum + group.bytes, 0);
  const detail = el("p", { class: "detail", "aria-live": "polite", text: t("pick_tile") });
  const label = t("treemap_label", { count: groups.length });
  const map = el("div", { class: "treemap", tabindex: "0", role: "group", "aria-label": label });
  let tiles = [];
  let current = -1;
  let sought = null;

  function point(index) {
    tiles[current]?.classList.remove("current");
    current = index;
    tiles[current].classList.add("current");
    detail.textContent = tiles[current].dataset.text;
  }

  function draw() {
    const [w, h] = [map.clientWidth, map.clientHeight];
    if (!w || !h || !total) return;
    const outer = nested(groups, key);
    tiles = [];
    current = -1;
    const boxes = squarify(outer.map((o) => o.sum), { x: 0, y: 0, w, h });
    map.replaceChildren(...outer.flatMap((o, i) => family(o, boxes[i], total, tiles)));
    dim();
    tiles.forEach((tile, i) => {
      tile.addEventListener("pointerenter", () => point(i));
      tile.addEventListener("click", () => point(i));
    });
  }

  const dim = () => tiles.forEach((tile) => tile.classList.toggle("dimmed", sought !== null && !sought(tile.dataset.text)));
  const search = searchField(t("alive"), (matches) => {
    sought = matches;
    dim();
    const found = groups.filter((group) => !matches || matches(describe(group, total)));
    const bytes = human(found.reduce((sum, group) => sum + group.bytes, 0));
    return t("found_bytes", { count: found.length, all: groups.length, bytes });
  });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || !tiles.length) return;
    event.preventDefault();
    point((current + step + tiles.length) % tiles.length);
  });
  onResize(map, draw);
  return el("div", {}, el("div", { class: "tools" }, search), map, detail);
}

// One outer box with its name and sum, and the tiles inside it.
function family(outer, box, total, tiles) {
  const head = box.h > 34 && box.w > 60 ? 18 : 0;
  const name = el("div", { class: "family", text: head ? `${outer.name} ${human(outer.sum)}` : "" });
  place(name, { ...box, h: head || box.h });
  const inner = { x: box.x, y: box.y + head, w: box.w, h: box.h - head };
  const nodes = squarify(outer.members.map((group) => group.bytes), inner).flatMap((rectangle, i) => {
    if (rectangle.w < 0.5 || rectangle.h < 0.5) return [];
    const tile = tileOf(outer.members[i], rectangle, total);
    tiles.push(tile);
    return [tile];
  });
  return [name, ...nodes];
}

function tileOf(group, rectangle, total) {
  const tile = el("div", { class: "tile", "data-text": describe(group, total) });
  tile.style.background = `var(${colorName(group.component)})`;
  place(tile, rectangle);
  if (rectangle.w > 54 && rectangle.h > 30) {
    tile.append(el("b", { text: whatIs(group) }), el("span", { text: human(group.bytes) }));
    if (rectangle.h > 48) tile.append(el("span", { text: group.module ?? group.stage ?? "" }));
  }
  return tile;
}

function aliveTable(groups, total) {
  return dataTable({
    caption: t("alive"),
    file: "alive",
    titled: true,
    limit: 10,
    columns: [
      column("bytes", "bytes", "mib"),
      column("share", "share", "percent"),
      column("count", "count", "count"),
      column("shape", "shape"),
      column("dtype", "dtype"),
      column("operation", "operation"),
      column("component", "component"),
      column("module", "module"),
      column("stage", "stage"),
    ],
    rows: groups.map((group) => ({
      ...group,
      share: group.bytes / total,
      operation: groupName(group),
      shape: shapeText(group),
    })),
  });
}

// The holes of a segment: its inactive blocks.
const holesOf = ([, blocks]) => blocks.filter(([, , active]) => !active).map(([, size]) => size);

function segmentView(segments) {
  if (!segments.length) return el("p", { class: "quiet", text: t("no_segments") });
  const sorted = [...segments].sort((a, b) => b[0] - a[0]);
  const holes = sorted.flatMap(holesOf);
  const [reserved, free] = [sorted.reduce((s, [size]) => s + size, 0), holes.reduce((s, size) => s + size, 0)];
  const text = t("segments_text", {
    count: sorted.length,
    reserved: human(reserved),
    free: human(free),
    share: percent(reserved ? free / reserved : 0),
    holes: holes.length,
    largest: human(Math.max(0, ...holes)),
  });
  const detail = el("p", { class: "detail", text: t("segments_label") });
  return el("div", {}, el("p", { text }), segmentMap(sorted, detail), detail, segmentTable(sorted));
}

function segmentTable(segments) {
  return dataTable({
    caption: t("segments"),
    file: "segments",
    titled: true,
    limit: 5,
    columns: [
      column("segment", "segment", "count"),
      column("bytes", "bytes", "mib"),
      column("used_bytes", "used", "mib"),
      column("free_bytes", "free", "mib"),
      column("holes", "holes", "count"),
      column("largest_hole_bytes", "largest_hole", "mib"),
    ],
    rows: segments.map((segment, i) => {
      const holes = holesOf(segment);
      const free = holes.reduce((sum, size) => sum + size, 0);
      const largest = Math.max(0, ...holes);
      return {
        segment: i + 1,
        bytes: segment[0],
        used_bytes: segment[0] - free,
        free_bytes: free,
        holes: holes.length,
        largest_hole_bytes: largest,
      };
    }),
  });
}

// Segments side by side in rows, all at one scale; one longer than a row goes on in the next.
function segmentLayout(segments, width, rows) {
  const total = segments.reduce((sum, [size]) => sum + size, 0);
  const gap = 2;
  const scale = Math.max(1e-12, (width * rows - gap * segments.length - width) / total);
  const pieces = []; // {row, x, w, segment, from}
  let [row, x] = [0, 0];
  segments.forEach(([size], segment) => {
    for (let from = 0; from < size; ) {
      if (width - x < 1) [row, x] = [row + 1, 0];
      const w = Math.min((size - from) * scale, width - x);
      pieces.push({ row, x, w, segment, from, scale });
      from += Math.max(1, w / scale);
      x += w;
    }
    x += gap;
  });
  return pieces;
}

function segmentMap(segments, detail) {
  const canvas = el("canvas", { class: "segments", role: "img", "aria-label": t("segments_label") });
  const [line, rows] = [20, segments.length > 40 ? 10 : 6];
  let pieces = [];
  function draw() {
    const width = canvas.clientWidth;
    if (!width) return;
    pieces = segmentLayout(segments, width, rows);
    const height = line * (Math.max(...pieces.map((piece) => piece.row)) + 1);
    const ratio = window.devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    [canvas.width, canvas.height] = [width * ratio, height * ratio];
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    for (const piece of pieces) paintPiece(context, piece, segments[piece.segment], line);
  }
  canvas.addEventListener("pointermove", (event) => {
    const row = Math.floor(event.offsetY / line);
    const piece = pieces.find((p) => p.row === row && event.offsetX >= p.x && event.offsetX < p.x + p.w);
    if (!piece) return;
    const at = piece.from + (event.offsetX - piece.x) / piece.scale;
    const [size, blocks] = segments[piece.segment];
    const block = blocks.find(([offset, bytes]) => at >= offset && at < offset + bytes);
    const what = block ? ` · ${t(block[2] ? "used" : "free")}: ${human(block[1])}` : "";
    detail.textContent = `${t("segment")} ${piece.segment + 1}: ${human(size)}${what}`;
  });
  onResize(canvas, draw);
  onTheme(canvas, draw);
  return canvas;
}

function paintPiece(context, piece, [, blocks], line) {
  const top = piece.row * line;
  context.fillStyle = cssColor("--hole");
  context.fillRect(piece.x, top, piece.w, line - 4);
  context.save();
  context.beginPath();
  context.rect(piece.x, top, piece.w, line - 4);
  context.clip();
  context.strokeStyle = cssColor("--hatch");
  for (let x = piece.x - line; x < piece.x + piece.w; x += 5) {
    context.beginPath();
    context.moveTo(x, top + line);
    context.lineTo(x + line, top);
    context.stroke();
  }
  context.fillStyle = cssColor("--activations");
  for (const [offset, size, active] of blocks) {
    if (active) context.fillRect(piece.x + (offset - piece.from) * piece.scale, top, size * piece.scale, line - 4);
  }
  context.restore();
}

// The whole section for one moment of a run.
function aliveView(moment) {
  const groups = moment.alive.map(unpack);
  const total = groups.reduce((sum, group) => sum + group.bytes, 0);
  const said = t("moment_is", {
    label: momentName(moment.label),
    allocated: human(moment.allocated_bytes),
    reserved: human(moment.reserved_bytes),
  });
  const holder = el("div");
  const keys = ["component", "stage", "module", "shape", "operation"];
  const choice = el("select", {}, ...keys.map((key) => el("option", { value: key, text: t(key) })));
  const show = () => holder.replaceChildren(total ? treemap(groups, choice.value) : el("p", { text: t("nothing_alive") }));
  choice.addEventListener("change", show);
  show();
  return el(
    "div",
    {},
    el("div", { class: "tools" }, el("p", { class: "said", "aria-live": "polite", text: said })),
    el("label", { class: "choice" }, `${t("group_by")} `, choice),
    holder,
    aliveTable(groups, total || 1),
    el("h3", { text: t("segments") }),
    segmentView(moment.segments),
  );
}
