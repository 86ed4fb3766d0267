// The stacked memory timeline: weights per component, activations above them, reserved, device, budget; stages below.

// Bytes of weights at each x, per component, in a fixed order.
function weightColumns(timeline, xs) {
  const names = [...new Set(timeline.weights.map((weight) => weight.component))];
  const rank = (name) => (COMPONENTS.includes(name) ? COMPONENTS.indexOf(name) : COMPONENTS.length);
  names.sort((a, b) => rank(a) - rank(b));
  return names.map((name) => {
    const spans = timeline.weights.filter((weight) => weight.component === name);
    const at = (x) => spans.reduce((sum, s) => (s.start <= x && x < s.end ? sum + s.bytes : sum), 0);
    return { name, values: xs.map(at) };
  });
}

// What is drawn, the largest area first so that the smaller ones lie on top of it: {label, color, values, fill|dash}.
function layers(run) {
  const [xs, allocated, reserved, device] = run.timeline.points;
  const weights = weightColumns(run.timeline, xs);
  const sums = xs.map(() => 0);
  const stacked = weights.map(({ name, values }) => {
    values.forEach((value, i) => (sums[i] = Math.min(allocated[i], sums[i] + value)));
    return { label: t("weights_of", { component: name }), color: colorName(name), values: [...sums], own: values, fill: true };
  });
  const own = allocated.map((value, i) => value - sums[i]);
  const top = { label: t(weights.length ? "activations" : "allocated"), color: "--activations", values: allocated, own, fill: true };
  const lines = run.cached ? [{ label: t("reserved"), color: "--reserved", values: reserved }] : [];
  if (device.some((value) => value !== null)) {
    lines.push({ label: t("device"), color: "--device", values: device, dash: [6, 4] });
  }
  if (run.limit) {
    lines.push({ label: run.limit.name ?? t("budget"), color: "--budget", values: xs.map(() => run.limit.bytes), flat: true });
  }
  return [top, ...stacked.reverse(), ...lines];
}

// A limit far above the curve would flatten it; it then stays in the legend only.
function highest(run) {
  const [, allocated, reserved, device] = run.timeline.points;
  const top = [allocated, reserved, device].reduce((m, values) => values.reduce((n, v) => Math.max(n, v ?? 0), m), 1);
  return run.limit && run.limit.bytes <= 2 * top ? Math.max(top, run.limit.bytes) : top;
}

function axes(run) {
  const common = { stroke: cssColor("--ink-2"), grid: { stroke: cssColor("--grid"), width: 1 }, ticks: { show: false } };
  const steps = Array.from({ length: 24 }, (_, i) => 2 ** (i + 16));
  const gigabytes = highest(run) >= 4 * GIB;
  const unit = gigabytes ? GIB : MIB;
  const bytes = (_, values) => values.map((value) => `${grouped(value / unit, Number.isInteger(value / unit) ? 0 : 1)}`);
  const label = gigabytes ? "GiB" : "MiB";
  const font = "12px system-ui, sans-serif";
  return [
    { ...common, font, size: 30, values: (_, values) => values.map((value) => grouped(value, Number.isInteger(value) ? 0 : 1)) },
    { ...common, font, incrs: steps, values: bytes, size: 52, label, labelFont: font, labelSize: 18 },
  ];
}

function chartOptions(run, drawn, width, hooks) {
  const stepped = uPlot.paths.stepped({ align: 1 });
  return {
    width,
    height: width < 600 ? 260 : 340,
    padding: [10, 8, 0, 0],
    legend: { show: false },
    scales: { x: { time: false }, y: { range: () => [0, highest(run) * 1.06] } },
    axes: axes(run),
    cursor: { y: false, points: { show: false }, drag: { x: true, y: false, setScale: false } },
    series: [
      {},
      ...drawn.map((layer) => ({
        stroke: layer.fill ? undefined : cssColor(layer.color),
        fill: layer.fill ? cssColor(layer.color) : undefined,
        width: layer.fill ? 0 : layer.flat ? 2 : 1.5,
        dash: layer.dash,
        paths: layer.flat ? undefined : stepped,
        points: { show: false },
        spanGaps: true,
      })),
    ],
    hooks,
  };
}

function legend(drawn) {
  const values = drawn.map(() => el("span", { class: "value" }));
  const items = drawn.map((layer, i) => {
    const mark = el("span", { class: layer.fill ? "swatch" : layer.dash ? "swatch line dashed" : "swatch line" });
    mark.style[layer.fill ? "background" : "borderColor"] = `var(${layer.color})`;
    return el("li", {}, mark, `${layer.label} `, values[i]);
  });
  // Stack order from the bottom up reads as weights, activations, lines.
  const fills = items.filter((_, i) => drawn[i].fill).reverse();
  const list = el("ul", { class: "legend" }, ...fills, ...items.filter((_, i) => !drawn[i].fill));
  const show = (index) => {
    drawn.forEach((layer, i) => {
      const value = (layer.own ?? layer.values)[index];
      values[i].textContent = value === null || value === undefined ? "–" : human(value);
    });
  };
  return { list, show };
}

// Position of the last point at or before x.
function indexAt(xs, x) {
  let [low, high] = [0, xs.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle - 1;
  }
  return low;
}

// The timeline on an axis: its places there; the own axis as it is, or in seconds.
function onAxis(timeline, clock) {
  const place = clock ?? ((x) => x);
  const stages = timeline.stages.map((stage) => ({ ...stage, start: place(stage.start), end: place(stage.end), own: stage }));
  const xs = timeline.points[0].map(place);
  const full = [xs[0], Math.max(xs[xs.length - 1], ...stages.map((stage) => stage.end), xs[0] + (clock ? 1e-6 : 1))];
  return { name: clock ? "seconds" : timeline.axis, xs, stages, full, moments: timeline.moments.map((m) => ({ ...m, x: place(m.x) })) };
}

let inSeconds = false; // what the reader chose last; other runs open in it where they can

function nearest(moments, x) {
  return moments.reduce((best, m, i) => (Math.abs(m.x - x) < Math.abs(moments[best].x - x) ? i : best), 0);
}

// The highest moment inside a range, else the one nearest to the range's middle.
function highestIn(moments, from, to) {
  const inside = moments.map((m, i) => [m, i]).filter(([m]) => m.x >= from && m.x <= to);
  if (!inside.length) return nearest(moments, (from + to) / 2);
  return inside.reduce((best, item) => (item[0].allocated_bytes > best[0].allocated_bytes ? item : best))[1];
}

// choose(index) is called with the moment that the reader picked. select(index) marks one from outside.
function timelineView(run, choose) {
  const timeline = run.timeline;
  const xs = timeline.points[0];
  const drawn = layers(run);
  const key = legend(drawn);
  const clock = clockOf(run);
  const choices = [onAxis(timeline, null), ...(clock ? [onAxis(timeline, clock)] : [])];
  let at = choices.at(inSeconds ? -1 : 0);
  let [chart, selected] = [null, 0];
  const moments = timeline.moments;
  const label = t("chart_label", { peak: human(run.peak.allocated), stage: run.stage });
  const holder = el("div", { class: "chart", tabindex: "0", role: "group", "aria-label": label });
  const ribbon = el("div", { class: "ribbon", role: "group", "aria-label": t("stages_ribbon") });

  const zoom = (from, to) => chart.setScale("x", { min: Math.max(at.full[0], from), max: Math.min(at.full[1], to) });
  const scaled = (factor) => {
    const { min, max } = chart.scales.x;
    const { full } = at;
    const center = moments[selected] ? Math.min(max, Math.max(min, at.moments[selected].x)) : (min + max) / 2;
    const half = Math.min(full[1] - full[0], (max - min) * factor) / 2;
    const from = Math.max(full[0], Math.min(center - half, full[1] - 2 * half));
    zoom(from, from + 2 * half);
  };
  const pick = (index) => {
    if (index >= 0 && index < moments.length) choose(index);
  };

  const hooks = {
    setSelect: [
      (u) => {
        const { left, width } = u.select;
        const [from, to] = [u.posToVal(left, "x"), u.posToVal(left + width, "x")];
        u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        if (width < 4) return moments.length ? pick(nearest(at.moments, from)) : undefined; // an unsteady click
        zoom(from, to);
        if (moments.length) pick(highestIn(at.moments, from, to));
      },
    ],
    setCursor: [(u) => key.show(u.cursor.idx ?? resting())],
    setScale: [(u, scale) => scale === "x" && paintRibbon(u)],
    draw: [(u) => at.moments.forEach((m, i) => paintMoment(u, m, i === selected))],
    ready: [
      (u) => {
        u.over.addEventListener("click", (event) => {
          if (moments.length) pick(nearest(at.moments, u.posToVal(event.offsetX, "x"))); // not called after a drag
        });
        u.over.addEventListener("dblclick", () => zoom(...at.full));
      },
    ],
  };
  const resting = () => indexAt(xs, moments[selected]?.x ?? xs[drawn[0].values.indexOf(Math.max(...drawn[0].values))]);

  function paintRibbon(u) {
    const { min, max } = u.scales.x;
    const [left, width] = [u.bbox.left / devicePixelRatio, u.bbox.width / devicePixelRatio];
    const pixel = (x) => left + ((Math.min(max, Math.max(min, x)) - min) / (max - min)) * width;
    ribbon.replaceChildren(
      ...at.stages
        .filter((stage) => stage.end > min && stage.start < max)
        .map((stage) => ribbonPart(stage, pixel(stage.start), pixel(stage.end), () => pick(momentOf(stage.own)))),
    );
  }

  const momentOf = (stage) => moments.findIndex((m) => m.x >= stage.start && m.x <= stage.end && m.label !== "peak");

  function build(moved = false) {
    const width = holder.clientWidth;
    if (!width) return;
    const range = chart && !moved ? [chart.scales.x.min, chart.scales.x.max] : at.full;
    chart?.destroy();
    chart = new uPlot(chartOptions(run, drawn, width, hooks), [at.xs, ...drawn.map((layer) => layer.values)], holder);
    zoom(...range);
    key.show(resting());
  }

  holder.addEventListener("keydown", (event) => {
    const keys = { ArrowRight: () => walk(1), ArrowLeft: () => walk(-1), "+": () => scaled(0.5), "-": () => scaled(2) };
    keys["="] = keys["+"];
    keys["0"] = keys.Home = () => zoom(...at.full);
    if (!keys[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    keys[event.key]();
  });
  function walk(step) {
    const order = moments.map((m, i) => i).sort((a, b) => moments[a].x - moments[b].x);
    pick(order[order.indexOf(selected) + step] ?? -1);
  }

  onResize(holder, () => build());
  onTheme(holder, () => chart && build());
  const button = (text, action, name) => el("button", { type: "button", text, "aria-label": name ?? text, on: { click: action } });
  const tools = el(
    "div",
    { class: "tools" },
    button("+", () => scaled(0.5)),
    button("−", () => scaled(2)),
    button(t("whole_run"), () => zoom(...at.full)),
    choices.length > 1 ? axisSwitch(choices, at, move) : null,
    csvLink("timeline", ["x", "allocated_bytes", "reserved_bytes", "device_bytes", ...(clock ? ["seconds"] : [])], () =>
      xs.map((x, i) => [...timeline.points.map((values) => values[i]), ...(clock ? [clock(x)] : [])]),
    ),
  );
  const axis = el("p", { class: "axis" });
  const untimed = run.stages.some((stage) => stage.seconds === null);
  const said = () => (axis.textContent = t(`axis_${at.name}`) + (at.name === "seconds" && clock && untimed ? ` (${t("untimed")})` : ""));
  function move(to) {
    at = to;
    inSeconds = at.name === "seconds";
    said();
    if (chart) build(true);
  }
  said();
  const help = el("p", { class: "quiet", text: t("timeline_help") });
  const select = (index) => {
    selected = index;
    if (!chart) return;
    chart.redraw(false);
    key.show(resting());
  };
  return { element: el("div", {}, tools, key.list, holder, ribbon, axis, help), select };
}

function axisSwitch(choices, shown, move) {
  const buttons = choices.map((axis) => el("button", { type: "button", text: t(`axis_${axis.name}`) }));
  const mark = (chosen) => buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(choices[i] === chosen)));
  buttons.forEach((button, i) =>
    button.addEventListener("click", () => {
      mark(choices[i]);
      move(choices[i]);
    }),
  );
  mark(shown);
  return el("span", { class: "axes", role: "group", "aria-label": t("axis") }, ...buttons);
}

function ribbonPart(stage, from, to, choose) {
  const step = stage.kind === "step";
  const attributes = { class: step ? "step" : "stage", title: `${stage.name} · ${stage.component ?? ""}` };
  const node = step ? el("span", attributes) : el("button", { ...attributes, type: "button", text: stage.name, on: { click: choose } });
  node.style.left = `${from}px`;
  node.style.width = `${Math.max(1, to - from)}px`;
  node.style.background = `var(${colorName(stage.component)})`;
  return node;
}

function paintMoment(u, moment, selected) {
  const x = Math.round(u.valToPos(moment.x, "x", true));
  if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) return;
  const context = u.ctx;
  const ratio = devicePixelRatio;
  context.save();
  context.fillStyle = context.strokeStyle = cssColor(selected ? "--ink" : "--ink-2");
  context.lineWidth = selected ? 2 * ratio : ratio;
  if (selected) {
    context.beginPath();
    context.moveTo(x, u.bbox.top);
    context.lineTo(x, u.bbox.top + u.bbox.height);
    context.stroke();
  }
  const size = (selected ? 6 : 4) * ratio;
  context.beginPath();
  context.moveTo(x - size, u.bbox.top);
  context.lineTo(x + size, u.bbox.top);
  context.lineTo(x, u.bbox.top + size * 1.5);
  context.fill();
  context.restore();
}
