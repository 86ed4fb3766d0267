// The page: the answer first, then the runs, then one run in detail.

const root = document.getElementById("report");
const state = { run: data.shown, pins: data.pinned };

function themeButton() {
  const button = el("button", { type: "button", class: "theme", text: t("theme") });
  button.addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    repaint();
  });
  return button;
}

function tile(label, value, note) {
  return el("div", { class: "stat" }, el("dt", { text: label }), el("dd", {}, value, note ? el("small", { text: note }) : null));
}

function tiles(run) {
  const items = [];
  for (const kind of ["device", "reserved", "allocated"]) {
    if (run.peak[kind] !== null) items.push(tile(t(`peak_${kind}`), human(run.peak[kind])));
  }
  if (run.fragmentation !== null) items.push(tile(t("fragmentation"), percent(run.fragmentation), t("moment_peak")));
  if (run.seconds !== null) items.push(tile(t("time_unloaded"), duration(run.seconds)));
  if (run.budget !== null) items.push(tile(t("budget"), human(run.budget), verdict(run)));
  return el("dl", { class: "stats" }, ...items);
}

// Which cards the run fits, as a row of their sizes.
function cardRow(run) {
  const items = data.cards.map((card) => {
    const good = run.card !== null && card >= run.card;
    const text = t(good ? "fits" : "does_not_fit");
    return el("li", { class: good ? "good" : "bad", title: `${card} GB: ${text}` }, `${good ? "✓" : "✗"} ${card} GB`);
  });
  return el("div", { class: "cards" }, el("span", { text: t("cards") }), el("ul", {}, ...items));
}

// The words before the colon say what the sentence is about; they are found at a glance.
function led(text) {
  const [, lead, rest] = /^(.{1,90}?(?:: |：))(.*)$/s.exec(text) ?? [null, "", text];
  return el("p", {}, lead ? el("b", { text: lead }) : null, rest);
}

function answerOf(run, headline) {
  const kind = el("p", { class: run.simulated ? "kind simulated" : "kind measured" });
  kind.textContent = `${run.label} · ${t(run.simulated ? "simulated" : "measured_on")} (${run.device})`;
  const kindOfAnswer = run.failure || run.fits === false ? "answer no" : "answer";
  const lines = [run.answer.owner, run.answer.change].filter(Boolean).map(led);
  const box = el("div", { class: kindOfAnswer }, kind, el(headline ? "h2" : "h1", { class: "headline", text: run.answer.headline }), ...lines);
  if (run.peak) box.append(tiles(run));
  if (run.peak && run.device !== "cpu" && !run.failure) box.append(cardRow(run));
  return box;
}

// A prediction that was measured follows its measurement.
function runsInOrder() {
  const measured = new Map(data.pairs);
  const entry = (index) => ({ run: data.runs[index], index, measured: data.runs[measured.get(index)] });
  const predictions = (index) => [...measured.keys()].filter((p) => measured.get(p) === index);
  const first = data.runs.map((_, index) => index).filter((index) => !measured.has(index));
  return first.flatMap((index) => [index, ...predictions(index)]).map(entry);
}

function runRow({ run, index, measured }) {
  return {
    index,
    run: run.label,
    kind: measured ? t("prediction_of", { run: measured.label }) : t(run.simulated ? "predicted" : "measured"),
    rank: data.ranks[index],
    marked: data.ranks[index] === 1,
    task: run.asked,
    peak_device_bytes: run.peak?.device,
    peak_reserved_bytes: run.peak?.reserved,
    peak_allocated_bytes: run.peak?.allocated,
    stage: run.stage,
    fragmentation: run.fragmentation,
    card_gb: !run.peak || run.device === "cpu" || run.failure ? null : run.card === null ? t("over_cards", { card: data.cards.at(-1) }) : `${run.card} GB`,
    verdict: verdict(run),
    seconds: run.seconds,
    step_seconds: run.step_seconds,
  };
}

function runsTable(show, pin) {
  const cached = data.runs.some((run) => run.cached);
  const control = (type, name, checked, label, change, index) => {
    const box = el("input", { type, name, "data-index": index, "aria-label": label, on: { change } });
    box.checked = checked;
    return box;
  };
  return dataTable({
    caption: t("runs"),
    file: "runs",
    titled: true,
    dense: true,
    columns: [
      column("run", "run"),
      column("rank", "rank", "count", { rises: true }),
      column("peak_device_bytes", "peak_device", "mib"),
      { ...column("show", "show", "text"), value: (row) => Number(row.index !== state.run), node: (row) => control("radio", "show", row.index === state.run, t("show_run", row), () => show(row.index), row.index) },
      { ...column("pin", "pin", "text"), value: (row) => Number(!state.pins.includes(row.index)), node: (row) => control("checkbox", "pin", state.pins.includes(row.index), t("pin_run", row), () => pin(row.index), row.index) },
      column("step_seconds", "step", "seconds"),
      column("kind", "kind", "text", { names: true }),
      ...(cached ? [column("card_gb", "card", "text")] : []),
      column("verdict", "verdict"),
      column("stage", "stage"),
      ...(cached ? [column("peak_reserved_bytes", "peak_reserved", "mib")] : []),
      column("peak_allocated_bytes", "peak_allocated", "mib"),
      ...(cached ? [column("fragmentation", "fragmentation", "percent")] : []),
      column("seconds", "time_unloaded", "seconds"),
      ...(data.kinds.length ? [column("task", "task")] : []),
    ],
    rows: runsInOrder().map(runRow),
  });
}

function momentButtons(moments, choose) {
  const buttons = moments.map((moment, i) => {
    const text = `${momentName(moment.label)} · ${human(moment.allocated_bytes)}`;
    return el("button", { type: "button", text, "aria-pressed": "false", on: { click: () => choose(i) } });
  });
  const mark = (index) => buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === index)));
  return { element: el("div", { class: "moments", role: "group", "aria-label": t("moment") }, ...buttons), mark };
}

function memoryOver(run) {
  const moments = run.timeline.moments;
  const alive = el("div");
  const buttons = momentButtons(moments, choose);
  const view = timelineView(run, choose);
  function choose(index) {
    buttons.mark(index);
    view.select(index);
    alive.replaceChildren(aliveView(moments[index]));
  }
  const parts = [section(t("timeline"), view.element)];
  if (run.borrowed) parts[0].append(el("p", { class: "quiet", text: t("borrowed") }));
  else if (!run.exact) parts[0].append(el("p", { class: "quiet", text: t("coarse") }));
  if (run.shortened) parts[0].append(el("p", { class: "quiet", text: t("shortened") }));
  if (moments.length) {
    parts.push(section(t("alive"), buttons.element, alive));
    choose(moments.reduce((best, m, i) => (m.allocated_bytes > moments[best].allocated_bytes ? i : best), 0));
  }
  return parts;
}

function folded(title, ...children) {
  return el("details", {}, el("summary", { text: title }), ...children);
}

// Folded until the reader pins runs: its tables would push the timeline of the run shown far down.
function comparison(a, b, open) {
  const unlike = a.asked === b.asked ? [] : [el("p", { class: "quiet", text: t("unlike_compared") })];
  const node = folded(comparedInShort(a, b), ...unlike, ...comparisonTables(a, b));
  node.open = open;
  return node;
}

function details(run) {
  const parts = run.peak && run.timeline.points[0].length ? memoryOver(run) : [];
  parts.push(section(t("stages"), stageTable(run)), section(t("components"), componentTable(run)));
  if (run.ranks.length) parts.push(section(t("every_gpu"), gpuTable(run)));
  if (run.advice.length) parts.push(section(t("advice_title"), adviceTable(run)));
  const notes = run.notes.map((note) => el("li", { text: note }));
  if (notes.length) parts.push(section(t("notes"), el("ul", {}, ...notes)));
  const settings = pairTable(run.settings, t("configuration"), "configuration");
  const environment = pairTable(run.environment, t("environment"), "environment");
  parts.push(section(t("configuration"), folded(t("configuration"), settings), folded(t("environment"), environment)));
  return parts;
}

function accuracy(pairs) {
  const every = pairs.map(([predicted, measured]) => {
    const [title, table] = [measured.label, accuracyTable(predicted, measured)];
    return pairs.length > 1 ? folded(title, table) : table;
  });
  const help = el("p", { class: "quiet", text: t("accuracy_help") });
  return section(t("accuracy"), help, pairs.length > 1 ? errorsTable(pairs) : null, ...every);
}

function glossary() {
  const items = data.glossary.flatMap(([term, meaning]) => [el("dt", { text: term }), el("dd", { text: meaning })]);
  return section(t("glossary"), el("dl", { class: "glossary" }, ...items));
}

function build() {
  const several = data.runs.length > 1;
  const answered = el("div");
  const shown = el("div");
  const compared = el("div");
  const runs = el("div");

  function show(index) {
    state.run = index;
    const run = data.runs[index];
    answered.replaceChildren(answerOf(run, several));
    shown.replaceChildren(...details(run));
  }
  function pin(index) {
    state.pins = state.pins.includes(index) ? state.pins.filter((i) => i !== index) : [...state.pins, index].slice(-2);
    runs.querySelectorAll("input[name=pin]").forEach((box) => (box.checked = state.pins.includes(Number(box.dataset.index))));
    compare(true);
  }
  function compare(open) {
    const [a, b] = state.pins.map((index) => data.runs[index]);
    compared.replaceChildren(b ? comparison(a, b, open) : el("p", { class: "quiet", text: t("compare_help") }));
  }

  const header = el("header", {}, el("p", { class: "brand", text: t("title") }), themeButton());
  root.append(header);
  if (several) {
    runs.append(runsTable(show, pin));
    const kinds = data.kinds.map(({ asked, said }) => el("li", {}, el("b", { text: asked }), ` ${said}`));
    const list = kinds.length ? el("ul", { class: "kinds" }, ...kinds) : null;
    root.append(el("h1", { class: "headline", text: data.headline }), ...(list ? [list] : []), answered, section(t("runs"), runs));
    root.append(section(t("compare"), compared));
    compare(false);
  } else {
    root.append(answered);
  }
  root.append(shown);
  if (data.pairs.length) root.append(accuracy(data.pairs.map(([p, m]) => [data.runs[p], data.runs[m]])));
  root.append(glossary());
  root.append(el("footer", {}, el("p", { text: t("made_by", { version: data.version, count: data.runs.length }) })));
  show(state.run);
}

build();
