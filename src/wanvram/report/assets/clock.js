// Seconds of the run at each place of the event axis, from the recorded times of its stages and steps.

// [from, to, seconds] of every stage, its steps in it; null where a stage other than loading has no known time.
function timedParts(run) {
  const queues = new Map();
  for (const stage of run.stages) queues.set(stage.name, [...(queues.get(stage.name) ?? []), stage]);
  const { stages } = run.timeline;
  const parts = [];
  for (const stage of stages.filter((s) => s.kind !== "step").sort((a, b) => a.start - b.start)) {
    const recorded = queues.get(stage.name)?.shift();
    if (!recorded || (recorded.seconds === null && stage.kind !== "load")) return null;
    const steps = stages.filter((s) => s.kind === "step" && s.start >= stage.start && s.end <= stage.end);
    parts.push(...partsOf(stage, Math.max(0, recorded.seconds ?? 0), steps, recorded.steps));
  }
  return parts;
}

// A stage cut at its steps; what they leave of its time is spread over its events between them.
function partsOf(stage, seconds, steps, times) {
  const known = times.reduce((sum, time) => sum + Math.max(0, time), 0);
  if (!steps.length || steps.length !== times.length || !known) return [[stage.start, stage.end, seconds]];
  const scale = Math.min(1, seconds / known);
  const parts = steps.sort((a, b) => a.start - b.start).map((step, i) => [step.start, step.end, Math.max(0, times[i]) * scale]);
  const between = stage.end - stage.start - steps.reduce((sum, step) => sum + step.end - step.start, 0);
  const rate = between > 0 ? (seconds - known * scale) / between : 0;
  const edges = [stage.start, ...parts.flatMap(([from, to]) => [from, to]), stage.end];
  const gaps = edges.flatMap((from, i) => (i % 2 ? [] : [[from, edges[i + 1], (edges[i + 1] - from) * rate]]));
  return [...parts, ...gaps].filter(([from, to]) => to > from).sort((a, b) => a[0] - b[0]);
}

// A function from a place on the own axis of the run's timeline to seconds; null where times are unknown or the axis is time.
function clockOf(run) {
  const parts = run.timeline.axis === "seconds" ? null : timedParts(run);
  if (!parts || !parts.some(([, , seconds]) => seconds > 0)) return null;
  let [elapsed, last] = [0, -Infinity];
  const knots = [];
  for (const [from, to, seconds] of parts) {
    if (from < last) return null; // stages that overlap have no common clock
    knots.push({ from, to, start: elapsed, seconds });
    [elapsed, last] = [elapsed + seconds, to];
  }
  const starts = knots.map((knot) => knot.from);
  return (x) => {
    const { from, to, start, seconds } = knots[indexAt(starts, x)];
    return x <= from ? start : start + seconds * Math.min(1, (x - from) / (to - from || 1));
  };
}
