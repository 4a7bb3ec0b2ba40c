// One test: what became of it, its time line, its calls, and what was said meanwhile.

const ACTIONS = new Set(["start", "run", "service", "policy", "storage", "network", "state", "failure", "event"]);
const ASKED = new Set(["granted", "refused"]); // of memory, what somebody asked for
const CHOICES = {
  "calls and starts": (record) => record.kind === "start" || record.kind === "run" || record.kind === "service" || record.kind === "failure" || (record.kind === "policy" && !record.call) || record.event === "refused",
  "what failed": failed,
  "everything": () => true,
};
const USUAL = "test-inst-"; // how names of VMs begin in tests of Qubes OS
const LOGS = ["console", "journal", "log"];

// The index is of the test's timelines: 0 is that of its last attempt.
async function unpack(number, index) {
  const element = document.getElementById(`timeline-${number}-${index}`);
  if (!element) return null;
  const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

// An empty argument may be told or not.
function sameService({ service: one = "" }, { service: other = "" }) {
  return one.replace(/\+$/, "") === other.replace(/\+$/, "");
}

// The call that a decision was about: the next one, for which a disposable may have to start
// first. One that was denied has begun in no case, or was refused.
function called(calls, decision) {
  return calls.find((one) => !one.policy && one.vm === decision.vm && sameService(one, decision) &&
    one.t >= decision.t - 0.05 && (decision.decision !== "deny" || (one.status === 126 && one.t < decision.t + 0.05)));
}

function shortName(vm = "") {
  return vm.startsWith(USUAL) ? vm.slice(USUAL.length) : vm;
}

// Number the records, and bring calls together with the decisions about them.
function prepare(test, timeline) {
  const records = timeline?.records ?? [];
  const waiting = [];
  let last = 0;
  records.forEach((record, index) => {
    record.index = index;
    last = Math.max(last, record.t + (record.duration ?? 0));
    if (record.kind === "service") waiting.push(record);
  });
  for (const record of records) {
    if (record.kind !== "policy") continue;
    const call = called(waiting, record);
    if (call) [call.policy, record.call] = [record, call];
  }
  return {
    ...test, records, vms: timeline?.vms ?? [], started: timeline?.started, left: timeline?.left_out ?? {},
    dropped: timeline?.dropped ?? 0, duration: Math.max(test.duration ?? 0, last, 1e-3),
  };
}

function when(record) {
  return html("span", { class: "when" }, record.t.toFixed(3));
}

class TestView {
  // again(index): somebody wants to see another attempt.
  constructor(main, test, again) {
    this.test = test;
    this.again = again;
    this.range = null;
    this.kind = "calls and starts";
    this.tab = "call";
    this.lanesBox = html("div");
    const parts = test.records.length ? [this.bar(), this.lanesBox, legend(), this.panes()] : [this.nothing()];
    main.replaceChildren(this.heading(), ...parts);
    if (!test.records.length) return;
    this.lanes = new Lanes(this.lanesBox, test, { choose: (record) => this.choose(record), select: (range) => this.select(range) });
    this.refresh();
    const failure = test.records.find((record) => record.kind === "failure");
    const broken = test.records.findLast((record) => failed(record) && (record.kind === "run" || record.kind === "service" || record.kind === "start"));
    const first = failure ? broken ?? failure : this.actions.items[0];
    if (first) this.choose(first);
  }

  heading() {
    const { test } = this;
    const facts = [took(test.duration), test.started ? clock(test.started, true) : "", test.worker ? `worker ${test.worker}` : "", test.attempts > 1 ? `${test.failed} of ${test.attempts} attempts failed` : "", test.where ?? ""];
    const parts = [html("h2", {}, badge(test.outcome), " ", html("span", { class: "id" }, test.test ?? ""))];
    parts.push(html("p", { class: "facts" }, facts.filter(Boolean).join(" · ")));
    const earlier = earlierRuns(test);
    if (earlier) parts.push(html("p", { class: "facts" }, earlier));
    if (test.timelines?.length > 1) {
      const choice = html("select", {}, test.timelines.map((name, index) => html("option", { value: index, selected: index === test.shown }, name || "the last")));
      choice.addEventListener("change", () => this.again(Number(choice.value)));
      parts.push(html("p", {}, html("label", {}, "Attempt shown: ", choice)));
    }
    if (test.cause) parts.push(html("pre", { class: BAD.has(test.outcome) ? "cause bad" : "cause", tabindex: 0 }, test.cause));
    const slow = Object.entries(test.slow ?? {}).filter(([name]) => name);
    for (const [name, usual] of slow) {
      parts.push(html("p", { class: "slow" }, `Slow: ${name} took ${took(test.phases?.[name])}; in three quarters of the tests it takes at most ${took(usual)}.`));
    }
    const left = Object.entries(test.left).map(([kind, number]) => `${number} × ${kind}`);
    if (test.dropped) left.push(`${test.dropped} that the recorder dropped`);
    if (left.length) parts.push(html("p", { class: "note" }, `No room here for: ${left.join(", ")}. See timeline.jsonl.`));
    if (test.files?.length) {
      const links = test.files.map(([name, link, bytes]) => html("li", {}, html("a", { href: link }, name), html("small", {}, ` ${size(bytes)}`)));
      parts.push(html("div", { class: "files" }, html("strong", {}, "Artefacts"), html("ul", {}, links)));
    }
    return html("div", { class: "heading" }, parts);
  }

  nothing() {
    return html("p", { class: "note" }, "This test left no time line. Those of tests that passed are kept with --trace=on.");
  }

  bar() {
    this.said = html("span", { role: "status" });
    this.tools = {
      zoom: button("Zoom to it", () => this.zoom(), { "aria-keyshortcuts": "z" }),
      whole: button("Whole test", () => this.whole(), { "aria-keyshortcuts": "0" }),
      drop: button("Drop the range", () => this.select(null), { "aria-keyshortcuts": "Escape" }),
    };
    return html("div", { class: "row bar" }, this.said, Object.values(this.tools));
  }

  panes() {
    const choice = html("select", { "aria-label": "Which actions are listed" }, Object.keys(CHOICES).map((name) => html("option", {}, name)));
    choice.addEventListener("change", () => { this.kind = choice.value; this.refresh(); });
    this.actionsCount = html("span");
    const box = html("div", { id: "actions", class: "list" });
    this.actions = new List(box, {
      label: "Actions", height: 26, empty: "none in this range",
      row: (record, row) => this.actionRow(record, row),
      choose: (record) => this.choose(record), open: (record) => this.around(record),
    });
    const left = html("section", { class: "pane actions", "aria-label": "Actions" },
      html("div", { class: "row head" }, html("h3", {}, "Actions "), this.actionsCount, choice), box);
    return html("div", { class: "panes" }, left, this.sides());
  }

  sides() {
    this.tabs = html("div", { role: "tablist", class: "tabs", "aria-label": "Beside the actions" });
    const names = { call: "Call", console: "Console", journal: "Journal", log: "Log" };
    this.tabButtons = Object.fromEntries(Object.entries(names).map(([name, text]) => {
      const made = button(text, () => this.show(name), { role: "tab", id: `tab-${name}`, "aria-controls": "side-panel" });
      return [name, made];
    }));
    this.tabs.append(...Object.values(this.tabButtons));
    this.tabs.addEventListener("keydown", (event) => {
      const all = Object.keys(this.tabButtons), step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      this.show(all[(all.indexOf(this.tab) + step + all.length) % all.length]);
      this.tabButtons[this.tab].focus();
    });
    this.details = html("div", { class: "details", tabindex: 0 });
    this.vm = html("select", { "aria-label": "Of which VM" }, html("option", { value: "" }, "all VMs"), this.test.vms.map((vm) => html("option", {}, vm)));
    this.grep = html("input", { type: "search", placeholder: "lines with …", "aria-label": "Text that lines must have" });
    for (const input of [this.vm, this.grep]) input.addEventListener("input", () => this.refresh());
    const box = html("div", { id: "lines", class: "list" });
    this.whole_line = html("pre", { class: "whole-line", tabindex: 0, hidden: true });
    this.lines = new List(box, {
      label: "Lines", height: 20, empty: "no lines in this range",
      row: (record, row) => row.append(when(record), html("span", { class: "vm" }, shortName(record.vm)), html("span", { class: record.priority <= 3 ? "line bad" : "line" }, record.kind === "log" ? `${record.level ?? ""} ${record.logger ?? ""}: ${record.line ?? ""}` : record.line ?? "")),
      choose: (record) => { this.whole_line.hidden = false; this.whole_line.textContent = record.line ?? ""; },
    });
    this.said_lines = html("div", { class: "said" }, html("div", { class: "row" }, this.vm, this.grep), box, this.whole_line);
    const panel = html("div", { role: "tabpanel", id: "side-panel" }, this.details, this.said_lines);
    return html("section", { class: "pane", "aria-label": "Call, console, journal and log" }, this.tabs, panel);
  }

  actionRow(record, row) {
    row.classList.toggle("bad", failed(record));
    const dot = html("span", { class: `dot ${record.kind} ${record.decision ?? ""}`, "aria-hidden": "true" });
    const status = record.status !== undefined && record.status !== 0 ? `status ${record.status}  ` : "";
    const text = html("span", { class: "what" }, dot, failed(record) ? "✗ " : "", label(record, shortName));
    row.append(when(record), html("span", { class: "vm" }, shortName(record.vm)), text, html("span", { class: "took" }, status + took(record.duration)));
    row.title = sentence(record);
  }

  within(record) {
    if (!this.range) return true;
    return record.t <= this.range[1] && end(record, this.test) >= this.range[0];
  }

  refresh() {
    const { records } = this.test, words = this.grep.value.toLowerCase();
    const all = records.filter((record) => ACTIONS.has(record.kind) || (record.kind === "memory" && ASKED.has(record.event)));
    const actions = all.filter((record) => CHOICES[this.kind](record) && this.within(record));
    this.actions.show(actions, this.chosen);
    this.actionsCount.textContent = `${actions.length} of ${all.length}`;
    for (const kind of LOGS) {
      const of = records.filter((record) => record.kind === kind);
      const now = of.filter((record) => this.within(record) && (!this.vm.value || record.vm === this.vm.value) && (!words || (record.line ?? "").toLowerCase().includes(words)));
      this.tabButtons[kind].textContent = `${kind[0].toUpperCase()}${kind.slice(1)} ${now.length === of.length ? of.length : `${now.length}/${of.length}`}`;
      if (kind === this.tab) this.lines.show(now);
    }
    this.said.textContent = this.range
      ? `Selected: ${at(this.range[0])} to ${at(this.range[1])} (${took(this.range[1] - this.range[0])}). Actions and lines below are those of this range.`
      : "Drag over the time line to see only what happened then; click a bar to see its call.";
    this.tools.zoom.disabled = this.tools.drop.disabled = !this.range;
    this.show(this.tab, false);
  }

  show(tab, again = true) {
    this.tab = tab;
    for (const [name, made] of Object.entries(this.tabButtons)) {
      made.setAttribute("aria-selected", name === tab ? "true" : "false");
      made.tabIndex = name === tab ? 0 : -1;
    }
    this.details.hidden = tab !== "call";
    this.said_lines.hidden = tab === "call";
    this.whole_line.hidden = true;
    this.tabs.nextElementSibling.setAttribute("aria-labelledby", `tab-${tab}`);
    if (again) this.refresh();
  }

  choose(record) {
    this.chosen = record;
    if (!CHOICES[this.kind](record)) {
      this.kind = "everything";
      this.actions.box.parentElement.querySelector("select").value = this.kind;
    }
    if (!this.within(record)) this.range = null;
    this.tab = "call";
    this.lanes.setRange(this.range);
    this.lanes.setChosen(record);
    this.refresh();
    this.actions.mark(record);
    this.details.replaceChildren(...this.describe(record));
    this.details.scrollTop = 0;
  }

  // Select the time that something took, and a little around it.
  around(record) {
    const margin = Math.max(0.02, (record.duration ?? 0) * 0.05);
    this.select([Math.max(0, record.t - margin), Math.min(this.test.duration, end(record, this.test) + margin)]);
  }

  describe(record) {
    const row = (name, value) => (value === undefined || value === "" ? null : html("div", {}, html("dt", {}, name), html("dd", {}, value)));
    const status = record.status === undefined ? (record.kind === "run" || record.kind === "service" ? "none: it did not end" : undefined)
      : `${record.status}${record.status === 127 ? ": command not found" : record.status === 126 ? ": refused or not executable" : ""}`;
    const parts = [html("h4", { class: failed(record) ? "bad" : "" }, failed(record) ? "✗ " : "", `${record.kind}${record.vm ? ` in ${record.vm}` : ""}`)];
    if (record.kind === "run") parts.push(html("pre", { class: "command" }, record.command ?? ""));
    if (record.kind === "failure") parts.push(html("pre", { class: "cause bad" }, record.text ?? ""));
    const decision = record.kind === "policy" ? record : record.policy;
    parts.push(html("dl", {},
      row("status", status), row("where", record.where), row("source", record.source && html("code", {}, record.source)), row("user", record.user), row("service", record.service), row("target", record.target),
      row("error", record.error), row("state", record.state), row("cause", record.cause),
      row("operation", record.operation), row("pool", record.pool), row("volume", record.volume),
      row("memory", record.kind === "memory" ? label(record) : undefined), row("change", record.change), row("peer", record.peer), row("name", record.name), row("keywords", record.kwargs),
      row("policy", decision?.decision), row("by rule", decision?.rule),
      row("began", `${at(record.t)}${this.test.started ? `, ${clock(this.test.started + record.t)}` : ""}`),
      row("took", record.duration === undefined ? undefined : took(record.duration)),
      row("standard output", record.stdout_bytes === undefined ? undefined : size(record.stdout_bytes)),
      row("start", record.warm === undefined ? undefined : record.warm ? "warm: from a saved state" : "cold: it booted")));
    if (record.stderr) parts.push(html("h5", {}, "Last lines of standard error"), html("pre", { class: "stderr" }, record.stderr));
    else if (record.kind === "run" || record.kind === "service") parts.push(html("p", { class: "note" }, "Nothing on standard error."));
    if (record.steps?.length) parts.push(html("h5", {}, "Steps"), this.stepTable(record.steps));
    parts.push(button("What happened meanwhile", () => { this.around(record); this.show("console"); }));
    const states = this.beforeAndAfter(record);
    if (states) parts.push(html("h5", {}, "VMs before and after"), states);
    return parts.filter(Boolean);
  }

  stepTable(steps) {
    const most = Math.max(...steps.map(([, seconds]) => seconds), 1e-6);
    return html("table", { class: "steps" }, steps.map(([name, seconds]) => {
      const bar = html("span", { class: "length" });
      bar.style.width = `${(seconds / most) * 100}%`;
      return html("tr", {}, html("th", {}, name), html("td", { class: "number" }, seconds === null ? "not done" : took(seconds)), html("td", { class: "wide" }, bar));
    }));
  }

  // The last thing known of each VM at a time.
  known(time, before) {
    const known = new Map(this.test.vms.map((vm) => [vm, {}]));
    for (const record of this.test.records) {
      if (before ? record.t >= time : record.t > time) break;
      if (record.kind === "state" && known.has(record.vm)) known.get(record.vm).state = record.state;
      if (record.kind === "memory") {
        for (const [vm, used] of Object.entries({ ...record.holds, ...record.used })) if (known.has(vm)) known.get(vm).used = used;
      }
    }
    return known;
  }

  beforeAndAfter(record) {
    const before = this.known(record.t, true), after = this.known(end(record, this.test), false);
    const words = ({ state = "–", used }) => `${state}${used === undefined ? "" : `, ${used} MiB`}`;
    if (!this.test.vms.length) return null;
    return html("table", { class: "states" }, html("tr", {}, html("th", {}, "VM"), html("th", {}, "before"), html("th", {}, "after")),
      this.test.vms.map((vm) => {
        const [was, is] = [words(before.get(vm)), words(after.get(vm))];
        return html("tr", { class: was === is ? "same" : "" }, html("th", {}, vm), html("td", {}, was), html("td", {}, is));
      }));
  }

  select(range) {
    this.range = range && range[1] > range[0] ? range : null;
    this.lanes.setRange(this.range);
    this.refresh();
  }

  zoom() {
    if (this.range) this.lanes.zoom(this.range);
  }

  whole() {
    this.lanes?.zoom([0, this.test.duration]);
  }
}

function legend() {
  const key = (kind, text) => html("li", {}, html("span", { class: `key ${kind}`, "aria-hidden": "true" }), text);
  return html("ul", { class: "legend", "aria-label": "Colours" },
    key("run", "command"), key("service", "service call"), key("start", "start, with its steps"), key("storage", "storage"), key("bad", "✗ failed"),
    key("arrow allow", "call allowed by policy"), key("arrow deny", "denied"), key("arrow ask", "asked"),
    key("state Running", "running"), key("state Transient", "starting, halting"), key("state Halted", "halted"),
    key("memory", "memory used, line: what the VM holds"), key("ticks", "lines of console, journal, log"));
}
