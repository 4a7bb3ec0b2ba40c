// Which worker ran what over the time of the run, and what earlier runs came to.

const IDLE = 0.02, MOST_TICKS = 6, MOST_UNSTABLE = 8;
const GOOD = new Set(["passed", "xfailed"]);

// Of each worker its tests in order; null if the run does not say when they began.
function shares(tests, run) {
  const known = tests.filter((test) => test.started !== undefined && run.started !== undefined && test.duration);
  if (!known.length) return null;
  const workers = new Map();
  for (const test of known) {
    const name = test.worker ?? "";
    if (!workers.has(name)) workers.set(name, []);
    const begin = Math.max(0, test.started - run.started);
    workers.get(name).push({ test, begin, end: begin + test.duration });
  }
  for (const spans of workers.values()) spans.sort((one, other) => one.begin - other.begin);
  const ends = [...workers.values()].flat().map(({ end }) => end);
  return { workers: new Map([...workers].sort(([one], [other]) => one.localeCompare(other, undefined, { numeric: true }))), whole: Math.max(run.duration ?? 0, ...ends) };
}

// Times in which a worker ran nothing, those too short to matter left out.
function gaps(spans, whole) {
  const found = [];
  let until = 0;
  for (const { begin, end } of [...spans, { begin: whole, end: whole }]) {
    if (begin - until >= whole * IDLE) found.push([until, begin]);
    until = Math.max(until, end);
  }
  return found;
}

function workersChart(tests, run, choose) {
  const shared = shares(tests, run);
  if (!shared) return null;
  const { workers, whole } = shared;
  const place = (element, from, to) => {
    element.style.left = `${(from / whole) * 100}%`;
    element.style.width = `${((to - from) / whole) * 100}%`;
    return element;
  };
  const rows = [...workers].map(([name, spans]) => {
    const idle = gaps(spans, whole);
    const idleSeconds = idle.reduce((sum, [from, to]) => sum + to - from, 0);
    const track = html("div", { class: "track" });
    for (const [from, to] of idle) {
      track.append(place(html("span", { class: "idle", title: `idle for ${took(to - from)}, from ${at(from)}` }), from, to));
    }
    spans.forEach(({ test, begin, end }, number) => {
      const bar = html("span", { class: `busy${number % 2 ? " odd" : ""}`, "data-outcome": test.outcome, title: `${test.test}\n${test.outcome}, ${took(test.duration)}, from ${at(begin)}` });
      bar.test = test;
      track.append(place(bar, begin, end));
    });
    const words = `${spans.length} ${spans.length === 1 ? "test" : "tests"}${idleSeconds ? `, idle for ${took(idleSeconds)} (${Math.round((idleSeconds / whole) * 100)} %)` : ""}`;
    return html("div", { class: "worker" }, html("div", { class: "of" }, html("b", {}, name || "one process"), html("small", {}, ` ${words}`)), track);
  });
  const box = html("div", { class: "workers", role: "group", "aria-label": `Tests of ${workers.size} workers over ${took(whole)}; the list of tests has them as text` }, rows, timeAxis(whole, place));
  box.addEventListener("click", ({ target }) => target.test && choose(target.test));
  return box;
}

function timeAxis(whole, place) {
  const rough = whole / MOST_TICKS, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const axis = html("div", { class: "track axis", "aria-hidden": "true" });
  for (let tick = 0; tick * step <= whole * 0.97; tick++) {
    axis.append(place(html("small", {}, tick ? took(tick * step) : "0"), tick * step, tick * step));
  }
  return html("div", { class: "worker" }, html("div", { class: "of" }), axis);
}

// How many of the earlier runs in which a test was not skipped were good.
function passRate(test) {
  const counted = (test.earlier ?? []).filter((outcome) => outcome !== "skipped");
  const good = counted.filter((outcome) => GOOD.has(outcome)).length;
  return counted.length ? { good, of: counted.length } : null;
}

// Earlier outcomes as marks, the newest last, and in words.
function earlierRuns(test) {
  const rate = passRate(test);
  if (!rate) return null;
  const marks = html("span", { class: "earlier", "aria-hidden": "true" }, test.earlier.map((outcome) => html("span", { class: "mark", "data-outcome": outcome, title: outcome }, MARKS[outcome] ?? "?")));
  const words = rate.good === rate.of ? `passed in all ${rate.of} earlier runs` : rate.good ? `passed in ${rate.good} of ${rate.of} earlier runs` : `passed in none of ${rate.of} earlier runs`;
  return html("span", { class: "rate" }, marks, ` ${words}`);
}

// Tests that passed in some earlier runs and not in others, the least reliable first.
function unstable(tests, link) {
  const found = tests.map((test) => ({ test, rate: passRate(test) })).filter(({ rate }) => rate && rate.good < rate.of && rate.good > 0);
  found.sort((one, other) => one.rate.good / one.rate.of - other.rate.good / other.rate.of || one.test.number - other.test.number);
  if (!found.length) return null;
  const rows = found.slice(0, MOST_UNSTABLE).map(({ test, rate }) => html("tr", {}, html("td", { class: "number" }, `${Math.round((rate.good / rate.of) * 100)} %`), html("td", {}, earlierRuns(test)), html("td", { class: "wide" }, link(test))));
  if (found.length > rows.length) rows.push(html("tr", {}, html("td", {}), html("td", { class: "note", colspan: 2 }, `and ${found.length - rows.length} more: itests history shows all`)));
  return html("table", { class: "times" }, rows);
}
