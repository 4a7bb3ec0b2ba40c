// The run: its overview, the list of its tests with a filter, keys, and links to tests.

const find = (id) => document.getElementById(id);
const run = JSON.parse(find("run").textContent);
const ORDER = ["failed", "error", "unfinished", "interrupted", "flaky", "xpassed", "passed", "xfailed", "skipped"];
const PHASES = ["setUp", "test", "tearDown", "setup", "call", "teardown"];
const ORDERS = {
  run: (one, other) => one.number - other.number,
  duration: (one, other) => (other.duration ?? 0) - (one.duration ?? 0),
  outcome: (one, other) => rank(one) - rank(other) || one.number - other.number,
  name: (one, other) => one.test.localeCompare(other.test),
};
const MOST_CAUSES = 30, MOST_OF_A_CAUSE = 6;
const rank = (test) => (ORDER.indexOf(test.outcome) + ORDER.length + 1) % (ORDER.length + 1);

const tests = run.tests.map((test, number) => ({
  ...test, number, test: test.test ?? "", outcome: test.outcome || "unfinished",
  words: [test.test, test.cause, test.where, test.outcome, ...(test.vms ?? [])].join("\n").toLowerCase(),
}));
const longest = Math.max(...tests.map((test) => test.duration ?? 0), 1e-6);
const counts = new Map();
for (const test of tests) counts.set(test.outcome, (counts.get(test.outcome) ?? 0) + 1);

let view = null; // of the test that is shown; null for the overview
let current = null;
let opening = 0;

// A bar as long as a test took, divided into its phases.
function length(test, most = longest) {
  const bar = html("span", { class: "length", "aria-hidden": "true" });
  bar.style.width = `${((test.duration ?? 0) / most) * 100}%`;
  for (const [name, seconds] of Object.entries(test.phases ?? {})) {
    const part = html("span", { class: `part p${PHASES.indexOf(name) % 3}${test.slow?.[name] ? " slow" : ""}` });
    part.style.flexGrow = Math.max(seconds, 0);
    bar.append(part);
  }
  return bar;
}

const list = new List(find("tests"), {
  label: "Tests", height: 46, empty: "no test is like that",
  row: (test, row) => {
    row.title = test.cause ? `${test.test}\n${test.cause}` : test.test;
    const mark = html("span", { class: "mark", "data-outcome": test.outcome }, html("span", { "aria-hidden": "true" }, MARKS[test.outcome] ?? "?"), html("span", { class: "unseen" }, `${test.outcome} `));
    const [scope, , name] = test.test.match(/^(?:(.*)(::))?(.*)$/s).slice(1);
    const text = html("span", { class: "name" }, html("b", {}, name), scope ? html("small", {}, ` ${scope}`) : "");
    const time = html("span", { class: "took" }, test.slow ? html("span", { class: "slow" }, "slow ") : "", took(test.duration));
    const why = BAD.has(test.outcome) || test.outcome === "skipped" ? html("span", { class: "why" }, firstLine(test.cause)) : html("span", { class: "bar" }, length(test));
    row.append(mark, text, time, why);
  },
  choose: (test) => open(test),
  open: () => find("main").focus(),
});

const hidden = new Set();
let onlySlow = false;

function filter() {
  const words = find("words").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = tests.filter((test) => !hidden.has(test.outcome) && (!onlySlow || test.slow) && words.every((word) => test.words.includes(word)));
  shown.sort(ORDERS[find("order").value]);
  list.show(shown, current);
  find("shown").textContent = shown.length === tests.length ? `${tests.length} tests` : `${shown.length} of ${tests.length} tests`;
}

function toggles() {
  const outcomes = [...counts.keys()].sort((one, other) => rank({ outcome: one }) - rank({ outcome: other }));
  const made = outcomes.map((outcome) => {
    const toggle = button([html("span", { "aria-hidden": "true" }, MARKS[outcome] ?? "?"), ` ${counts.get(outcome)} ${outcome}`], () => {
      if (hidden.has(outcome)) hidden.delete(outcome);
      else hidden.add(outcome);
      toggle.setAttribute("aria-pressed", hidden.has(outcome) ? "false" : "true");
      filter();
    }, { "aria-pressed": "true", "data-outcome": outcome });
    return toggle;
  });
  const slow = tests.filter((test) => test.slow).length;
  if (slow) {
    const toggle = button(`${slow} slow`, () => {
      onlySlow = !onlySlow;
      toggle.setAttribute("aria-pressed", onlySlow ? "true" : "false");
      filter();
    }, { "aria-pressed": "false", title: "only tests of which a phase took over three times as long as in three quarters of the tests" });
    made.push(toggle);
  }
  find("outcomes").append(...made);
}

// Of a flaky test its last attempt passed: the one before says more.
async function open(test, tell = true, attempt = test.outcome === "flaky" ? (test.timelines?.length ?? 1) - 1 : 0) {
  const mine = ++opening;
  current = test;
  find("overview").removeAttribute("aria-current");
  if (tell) history.replaceState(null, "", `#${encodeURIComponent(test.test)}`);
  let timeline = null;
  try {
    timeline = await unpack(test.number, attempt);
  } catch (error) {
    console.warn("this time line cannot be unpacked", error);
  }
  if (mine !== opening) return;
  find("main").className = "of-test";
  view = new TestView(find("main"), prepare({ ...test, shown: attempt }, timeline), (index) => open(test, false, index));
  find("main").scrollTop = 0;
}

function overview() {
  opening++;
  view = current = null;
  find("overview").setAttribute("aria-current", "page");
  history.replaceState(null, "", location.pathname + location.search);
  list.show(list.items);
  const link = (test) => button(test.test, () => { list.mark(test); open(test); }, { class: "link" });
  const parts = [html("h2", {}, badge(run.outcome), ` ${summary()}`)];
  const bad = tests.filter((test) => BAD.has(test.outcome));
  if (bad.length) parts.push(html("section", {}, html("h3", {}, "What failed"), failures(bad, link)));
  const chart = workersChart(tests, run, (test) => { list.mark(test); open(test); });
  const share = chart ? [html("h4", {}, "Which worker ran what"), chart] : [];
  parts.push(html("section", {}, html("h3", {}, "Where the time went"), times(), share, html("h4", {}, "The longest tests"), slowest(link)));
  const mixed = unstable(tests, link);
  if (mixed) parts.push(html("section", {}, html("h3", {}, "What passes now and then"), mixed));
  parts.push(html("section", {}, html("h3", {}, "The run"), facts()));
  find("main").className = "";
  find("main").replaceChildren(...parts);
}

// Those with the same cause together: twenty tests that fail for one reason are one trouble.
function failures(bad, link) {
  const causes = new Map();
  for (const test of bad) {
    const cause = firstLine(test.cause) || "no reason was given";
    if (!causes.has(cause)) causes.set(cause, []);
    causes.get(cause).push(test);
  }
  const rows = [...causes].slice(0, MOST_CAUSES).map(([cause, having]) => {
    const links = having.slice(0, MOST_OF_A_CAUSE).map((test) => html("li", {}, badge(test.outcome), " ", link(test), html("small", {}, ` ${test.where ?? ""} `, earlierRuns(test) ?? "")));
    if (having.length > links.length) links.push(html("li", {}, html("small", {}, `and ${having.length - links.length} more: filter by words of the cause`)));
    return html("li", {}, html("pre", { class: "cause bad" }, cause), html("ul", {}, links));
  });
  if (causes.size > rows.length) rows.push(html("li", { class: "note" }, `and ${causes.size - rows.length} other causes: the list of tests, sorted by outcome, has all`));
  return html("ul", { class: "failures" }, rows);
}

function summary() {
  const words = [...counts].sort(([one], [other]) => rank({ outcome: one }) - rank({ outcome: other })).map(([outcome, number]) => `${number} ${outcome}`);
  return words.join(", ") || "no tests";
}

function times() {
  const totals = new Map();
  for (const test of tests) {
    for (const [name, seconds] of Object.entries(test.phases ?? {})) totals.set(name, (totals.get(name) ?? 0) + seconds);
  }
  const most = Math.max(...totals.values(), 1e-6), all = tests.reduce((sum, test) => sum + (test.duration ?? 0), 0);
  const rows = [...totals].map(([name, seconds]) => {
    const bar = html("span", { class: "length" }, html("span", { class: `part p${PHASES.indexOf(name) % 3}` }));
    bar.style.width = `${(seconds / most) * 100}%`;
    const slow = tests.filter((test) => test.slow?.[name]).length;
    return html("tr", {}, html("th", {}, name), html("td", { class: "number" }, took(seconds)), html("td", { class: "number" }, `${Math.round((seconds / Math.max(all, 1e-6)) * 100)} %`), html("td", { class: "wide" }, bar), html("td", {}, slow ? html("span", { class: "slow" }, `slow in ${slow}`) : ""));
  });
  return html("table", { class: "times" }, rows);
}

function slowest(link) {
  const rows = [...tests].sort(ORDERS.duration).slice(0, 8).map((test) => {
    const slow = Object.entries(test.slow ?? {}).filter(([name]) => name).map(([name, usual]) => `slow ${name}: three quarters take at most ${took(usual)}`);
    return html("tr", {}, html("td", { class: "number" }, took(test.duration)), html("td", { class: "wide" }, length(test)), html("td", {}, link(test), slow.length ? html("small", {}, ` ${slow.join(", ")}`) : ""));
  });
  return html("table", { class: "times" }, rows);
}

function facts() {
  const rows = [["began", run.started === undefined ? "" : clock(run.started, true)], ["took", took(run.duration)],
    ["of tests, together", took(tests.reduce((sum, test) => sum + (test.duration ?? 0), 0))],
    ["command", (run.command ?? []).join(" ")], ["seed", run.seed], ...Object.entries(run.host ?? {}).map(([name, said]) => [name, name === "memory" && /^\d+$/.test(said) ? `${said} MiB for VMs` : said])];
  return html("dl", {}, rows.filter(([, value]) => value !== undefined && value !== "").map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value))));
}

function step(by, right = () => true) {
  const { items } = list;
  for (let index = items.indexOf(current) + by; index >= 0 && index < items.length; index += by) {
    if (right(items[index])) return list.select(index);
  }
}

function here() {
  let name = location.hash.slice(1);
  try {
    name = decodeURIComponent(name);
  } catch {
    // what is no encoding is taken as it is
  }
  const test = name && tests.find((one) => one.test === name);
  if (test) {
    if (!list.items.includes(test)) {
      find("words").value = "";
      filter();
    }
    list.mark(test);
    open(test, false);
  } else overview();
}

const KEYS = {
  "/": () => find("words").select(), j: () => step(1), k: () => step(-1),
  f: () => step(1, (test) => BAD.has(test.outcome)), F: () => step(-1, (test) => BAD.has(test.outcome)),
  o: overview, z: () => view?.zoom(), 0: () => view?.whole(), Escape: () => view?.lanes && view.select(null),
  "?": () => find("help").showModal(),
};

addEventListener("keydown", (event) => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.ctrlKey || event.altKey || event.metaKey || find("help").open) return;
  if (typing && event.key === "Escape") event.target.blur();
  if (typing || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
});

document.title = `${run.outcome ?? "run"}: ${summary()}`;
find("title").replaceChildren(badge(run.outcome), " Integration tests");
find("facts").textContent = [summary(), took(run.duration), run.started === undefined ? "" : clock(run.started, true)].filter(Boolean).join(" · ");
find("legend-of-help").append(legend());
find("open-help").addEventListener("click", KEYS["?"]);
find("overview").addEventListener("click", overview);
find("words").addEventListener("input", filter);
find("order").addEventListener("change", filter);
addEventListener("hashchange", here);
toggles();
filter();
here();
