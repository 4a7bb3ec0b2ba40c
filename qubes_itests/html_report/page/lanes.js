// The time line of a test: a lane for its phases and one for each VM, over its memory.

const BAR = 16, STRIP = 7, LINES = 9, DISK = 5, GAP = 6, MOST_ROWS = 6, MOST_LANES = 40;
const SPANS = new Set(["start", "run", "service", "storage"]);
const SAID = new Set(["console", "journal", "log"]);

function end(record, test) {
  return record.duration === undefined && (SPANS.has(record.kind) || record.kind === "phase")
    ? test.duration : record.t + (record.duration ?? 0);
}

function failed(record) {
  return record.ok === false || record.error !== undefined || record.kind === "failure" || record.decision === "deny" || record.event === "refused" ||
    (record.status !== undefined && record.status !== 0);
}

function label(record, short = (vm) => vm) {
  switch (record.kind) {
    case "run": return firstLine(record.command);
    case "service": return `${record.service ?? ""} → ${short(record.target ?? "")}`;
    case "policy": return `policy: ${record.decision ?? ""} ${record.service ?? ""} → ${short(record.target ?? "")}`;
    case "start": return `start${record.warm === false ? ", cold" : record.warm ? ", warm" : ""}`;
    case "storage": return `${record.operation ?? ""} ${record.volume ?? ""}`;
    case "network": return `network ${record.change ?? ""} ${record.peer ?? ""}`;
    case "state": return `is ${record.state ?? ""}${record.cause ? `: ${record.cause}` : ""}`;
    case "phase": return record.name ?? "";
    case "failure": return firstLine(record.text);
    case "memory": return `memory ${record.event ?? ""}: ${record.amount ?? "?"} MiB, ${record.free ?? "?"} MiB are free`;
    default: return record.line ?? record.name ?? record.kind;
  }
}

// What a person is told of one record where there is room for a line.
function sentence(record) {
  const status = record.status === undefined ? "" : `, status ${record.status}`;
  const time = record.duration === undefined ? "" : `, ${took(record.duration)}`;
  return `${at(record.t)}  ${record.vm ?? ""}  ${label(record)}${status}${time}`;
}

class Lanes {
  // choose(record): somebody clicked it; select(range): chose a range, or null.
  constructor(box, test, { choose, select }) {
    Object.assign(this, { box, test, choose, select, range: null, chosen: null });
    this.view = [0, test.duration];
    this.axis = svg("svg", { class: "axis", "aria-hidden": "true" });
    this.plot = svg("svg", { class: "plot", role: "img", "aria-label": this.words() });
    this.shades = [0, 1].map(() => html("div", { class: "shade" }));
    this.cursor = html("div", { class: "cursor", hidden: true }, html("span"));
    this.handles = ["begin", "end"].map((name, side) => this.handle(name, side));
    fill(box, { class: "lanes" }, [html("div", { class: "head" }, this.axis, this.handles), this.plot, this.shades, this.cursor]);
    this.lanes = this.arrange();
    box.addEventListener("pointerdown", (event) => this.press(event));
    box.addEventListener("pointermove", (event) => this.hover(event));
    box.addEventListener("pointerleave", () => { this.cursor.hidden = true; });
    box.addEventListener("dblclick", () => this.zoom([0, this.test.duration]));
    box.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    new ResizeObserver(() => box.clientWidth !== this.drawnWidth && this.draw()).observe(box);
  }

  words() {
    const { vms, records } = this.test;
    const calls = records.filter((record) => record.kind === "run" || record.kind === "service");
    return `Time line of ${took(this.test.duration)}: ${vms.length} VMs, ${calls.length} calls, which the list below has as text`;
  }

  // Which lanes there are, and in which row of its lane each bar is.
  arrange() {
    const { vms, records } = this.test;
    const lanes = new Map(vms.map((vm) => [vm, { vm, items: [], states: [], memory: [], lines: [] }]));
    const lane = (name) => {
      if (!lanes.has(name) && lanes.size < MOST_LANES) {
        lanes.set(name, { vm: name, items: [], states: [], memory: [], lines: [] });
      }
      return lanes.get(name);
    };
    for (const record of records) {
      const home = record.kind === "phase" || record.kind === "failure" ? undefined
        : record.vm !== undefined ? lane(record.vm)
        : record.kind === "storage" ? lane("storage") : undefined;
      if (SPANS.has(record.kind)) home?.items.push({ record, ghost: false });
      else if (record.kind === "state") home?.states.push(record);
      else if (SAID.has(record.kind)) home?.lines.push(record.t);
      else if (record.kind === "network") home?.items.push({ record, ghost: false });
      if (record.kind === "service" && record.target && record.target !== record.vm) {
        lane(record.target)?.items.push({ record, ghost: true });
      }
      if (record.kind === "memory") this.addMemory(record, lanes, lane);
    }
    for (const one of lanes.values()) this.pack(one);
    // Who comes first is above: a caller, and the disposable that it has started.
    const first = ({ items, states, memory, lines }) =>
      Math.min(items[0]?.record.t ?? Infinity, states[0]?.t ?? Infinity, lines[0] ?? Infinity, memory.length ? 1e9 : Infinity);
    return [...lanes.values()].sort((one, other) => first(one) - first(other));
  }

  // A guest that reports nothing uses what it holds, as far as anybody knows; a VM that is
  // told no more of holds nothing.
  addMemory({ t, used = {}, holds = {} }, lanes, lane) {
    for (const vm of Object.keys({ ...used, ...holds })) {
      const most = holds[vm] ?? used[vm];
      lane(vm)?.memory.push({ t, used: used[vm] ?? most, held: most });
    }
    for (const { memory } of lanes.values()) {
      if (memory.length && memory.at(-1).t !== t) memory.push({ t, used: 0, held: 0 });
    }
  }

  pack(lane) {
    const ends = [];
    lane.items.sort((one, other) => one.record.t - other.record.t);
    for (const item of lane.items) {
      // Thin and on one row below: storage has many short operations at once.
      if (item.record.kind === "storage") continue;
      let row = ends.findIndex((until) => until <= item.record.t);
      if (row < 0) row = ends.length < MOST_ROWS ? ends.length : ends.indexOf(Math.min(...ends));
      item.row = row;
      ends[row] = Math.max(end(item.record, this.test), item.record.t + this.test.duration / 400);
    }
    lane.rows = Math.max(1, ends.length);
    lane.most = lane.memory.reduce((most, { used, held }) => Math.max(most, used, held), 0);
  }

  get gutter() { return this.box.clientWidth < 600 ? 84 : 132; }

  get scale() {
    const [from, to] = this.view;
    return (this.box.clientWidth - this.gutter - 14) / Math.max(to - from, 1e-6);
  }

  x(time) { return this.gutter + (time - this.view[0]) * this.scale; }

  time(event) {
    const left = event.clientX - this.box.getBoundingClientRect().left;
    return clamp(this.view[0] + (left - this.gutter) / this.scale, ...this.view);
  }

  draw() {
    const width = this.box.clientWidth;
    if (!width) return;
    this.drawnWidth = width;
    this.drawAxis(width);
    const parts = { back: [], bars: [], arrows: [], front: [] };
    let y = this.drawPhases(0, parts);
    const places = new Map();
    for (const lane of this.lanes) {
      lane.y = y;
      lane.height = STRIP + lane.rows * (BAR + 2) + DISK + LINES + GAP;
      this.drawLane(lane, parts, width, places);
      y += lane.height;
    }
    this.drawArrows(parts, places);
    for (const record of this.test.records) {
      if (record.kind === "failure") parts.front.push(this.failure(record, y));
    }
    const clip = svg("clipPath", { id: "clip" }, svg("rect", { x: this.gutter - 1, y: 0, width: Math.max(0, width - this.gutter - 6), height: y }));
    const inside = svg("g", { "clip-path": "url(#clip)" }, parts.bars, parts.arrows, parts.front);
    fill(this.plot, { width, height: y }, []).replaceChildren(clip, ...parts.back, inside);
    this.mark();
  }

  drawAxis(width) {
    const [from, to] = this.view, room = width - this.gutter - 14;
    const rough = ((to - from) / Math.max(2, room / 90)) || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const marks = [];
    for (let tick = Math.ceil(from / step); tick * step <= to + 1e-9 && marks.length < 100; tick++) {
      const x = this.x(tick * step);
      marks.push(svg("line", { x1: x, x2: x, y1: 17, y2: 24 }));
      marks.push(svg("text", { x, y: 13, "text-anchor": x > width - 40 ? "end" : "middle" }, `${(tick * step).toFixed(digits)} s`));
    }
    fill(this.axis, { width, height: 24 }, []).replaceChildren(svg("text", { x: 8, y: 13 }, "time"), ...marks);
  }

  // Phases of a phase are below it: those of a TestCase are in the call of pytest.
  drawPhases(y, { back, bars }) {
    const phases = this.test.records.filter((record) => record.kind === "phase");
    if (!phases.length) return y;
    back.push(svg("text", { class: "name", x: 8, y: y + 16 }, "phases"));
    const open = [];
    let rows = 1;
    phases.forEach((record, number) => {
      while (open.length && end(open.at(-1), this.test) <= record.t + 1e-6) open.pop();
      const slow = this.test.slow?.[record.name];
      const words = `${label(record)} ${took(record.duration)}${slow ? ", slow" : ""}`;
      bars.push(this.bar(record, y + 2 + open.length * (BAR + 3), BAR + 2, words, `phase p${number % 3}${slow ? " slow" : ""}`));
      open.push(record);
      rows = Math.max(rows, open.length);
    });
    return y + rows * (BAR + 3) + GAP;
  }

  drawLane(lane, { back, bars }, width, places) {
    const { y, height } = lane, base = y + height - GAP / 2 - LINES;
    const cut = Math.floor((this.gutter - 16) / 7.3);
    const short = shortName(lane.vm);
    const name = short.length > cut ? `${short.slice(0, cut - 1)}…` : short;
    back.push(svg("rect", { class: "ground", x: 0, y, width, height: height - GAP / 2 }));
    back.push(svg("text", { class: "name", x: 8, y: y + 18 }, name, svg("title", {}, lane.vm)));
    if (lane.memory.length) {
      const used = lane.memory.map((point) => point.used).filter(Boolean);
      if (!used.length) used.push(0);
      const words = `${[...new Set([Math.min(...used), Math.max(...used)])].join("–")} MiB`;
      if (height > 36) back.push(svg("text", { class: "small", x: 8, y: y + 31 }, words));
      bars.push(...this.curves(lane, base));
    }
    lane.states.forEach((record, index) => {
      const until = lane.states[index + 1]?.t ?? this.test.duration;
      bars.push(this.rect(record, record.t, until, y + 1, STRIP - 2, `state ${record.state ?? ""}`, `${lane.vm} ${label(record)}`));
    });
    for (const item of lane.items) {
      const { record, ghost } = item, thin = record.kind === "storage";
      const top = y + STRIP + (thin ? lane.rows : item.row) * (BAR + 2);
      places.set(record, { ...places.get(record), [ghost ? "to" : "from"]: top });
      const words = ghost ? `${record.service ?? ""} from ${shortName(record.vm)}` : label(record, shortName);
      bars.push(this.bar(record, top, thin ? DISK : BAR, words, `${record.kind}${ghost ? " ghost" : ""}`));
    }
    bars.push(this.ticks(lane, y + height - GAP / 2 - LINES + 1));
  }

  // A path of what stays until the next point.
  curves({ memory, most, y }, base) {
    const scale = (base - y - STRIP) / Math.max(most, 1);
    const path = (value) => memory.reduce((words, point, index) => {
      const x = this.x(point.t).toFixed(1), top = (base - value(point) * scale).toFixed(1);
      return words + (index ? `H${x}V${top}` : `M${x} ${top}`);
    }, "") + `H${this.x(this.test.duration).toFixed(1)}`;
    const used = path((point) => point.used);
    const first = this.x(memory[0].t).toFixed(1);
    return [
      svg("path", { class: "memory", d: `${used}V${base}H${first}Z` }),
      svg("path", { class: "held", d: path((point) => point.held) }),
    ];
  }

  ticks(lane, y) {
    const bins = new Map();
    for (const time of lane.lines) {
      const x = Math.round(this.x(time) / 3) * 3;
      bins.set(x, (bins.get(x) ?? 0) + 1);
    }
    let path = "";
    for (const [x, number] of bins) {
      const high = Math.min(LINES - 2, 2 + number);
      path += `M${x} ${y + LINES - 2}v${-high}`;
    }
    return svg("path", { class: "ticks", d: path }, svg("title", {}, `${lane.lines.length} lines of console, journal and log`));
  }

  rect(record, from, to, y, height, kind, words) {
    const x = this.x(from), width = Math.max(2.5, this.x(to) - x);
    return svg("rect", { class: kind, x, y, width, height }, svg("title", {}, words));
  }

  bar(record, y, height, words, kind) {
    const until = end(record, this.test), [from, to] = this.view;
    if (until < from || record.t > to) return "";
    const x = this.x(Math.max(record.t, from - (to - from)));
    const width = Math.max(3, this.x(Math.min(until, to + (to - from))) - x);
    const bad = failed(record);
    const open = record.duration === undefined && SPANS.has(record.kind);
    const group = svg("g", {
      class: `bar ${kind}${bad ? " bad" : ""}${open ? " open" : ""}${record === this.chosen ? " chosen" : ""}`,
      "data-record": record.index,
    }, svg("title", {}, sentence(record)), svg("rect", { x, y, width, height, rx: 2 }));
    if (record.kind === "start") group.append(...this.steps(record, y, height));
    // Text begins where the bar is seen.
    const left = Math.max(x, this.x(from)), letters = Math.floor((Math.min(x + width, this.x(to)) - left - 6) / 6.4);
    const text = bad && !words.startsWith("✗") ? `✗ ${words}` : words;
    if (letters >= 3 && height >= BAR) {
      const shown = text.length > letters ? `${text.slice(0, letters - 1)}…` : text;
      group.append(svg("text", { x: left + 4, y: y + height / 2 + 4 }, shown));
    }
    return group;
  }

  steps(record, y, height) {
    let time = record.t;
    return (record.steps ?? []).map(([name, known], index) => {
      const seconds = known ?? Math.max(0, end(record, this.test) - time);
      const x = this.x(time), width = Math.max(0, seconds * this.scale);
      time += seconds;
      return svg("rect", { class: `step${index % 2 ? " odd" : ""}`, x, y: y + height - 4, width, height: 4 }, svg("title", {}, `${name}: ${known === null ? "not done" : took(known)}`));
    });
  }

  drawArrows({ arrows }, places) {
    const policies = this.test.records.filter((record) => record.kind === "policy");
    for (const [record, { from, to }] of places) {
      if (record.kind !== "service" || from === undefined || to === undefined) continue;
      const decision = record.policy?.decision ?? "unknown";
      arrows.push(this.arrow(record, decision, from, to));
    }
    const lanes = new Map(this.lanes.map((lane) => [lane.vm, lane]));
    for (const record of policies) {
      const from = lanes.get(record.vm), to = lanes.get(record.target);
      if (record.call || !from || from === to) continue;
      const begin = from.y + STRIP;
      arrows.push(to ? this.arrow(record, record.decision, begin, to.y + STRIP) : this.nowhere(record, begin));
    }
  }

  arrow(record, decision, from, to) {
    const x = this.x(record.t) + 1, down = to > from;
    const begin = from + (down ? BAR : 0), tip = to + (down ? 0 : BAR), wing = down ? -6 : 6;
    const words = record.policy ? `${sentence(record)}\n${label(record.policy)} (${record.policy.rule ?? ""})` : sentence(record);
    const lines = `M${x} ${begin}V${tip + wing / 2}`, head = `M${x} ${tip}l-4 ${wing}h8Z`;
    return svg("g", { class: `arrow ${decision ?? ""}`, "data-record": record.index },
      svg("title", {}, words), svg("path", { class: "hit", d: lines }), svg("path", { d: lines }), svg("path", { class: "tip", d: head }));
  }

  // A call that reached no VM: its target is a keyword, and it was refused.
  nowhere(record, y) {
    return svg("g", { class: `arrow ${record.decision ?? ""}`, "data-record": record.index },
      svg("title", {}, sentence(record)), svg("text", { class: "cross", x: this.x(record.t) - 4, y: y + BAR + 12 }, "✗"));
  }

  failure(record, height) {
    const x = this.x(record.t);
    return svg("g", { class: "failure", "data-record": record.index },
      svg("title", {}, sentence(record)), svg("line", { class: "hit", x1: x, x2: x, y1: 0, y2: height }), svg("line", { x1: x, x2: x, y1: 0, y2: height }));
  }

  // The selected range: two handles for keyboards and fingers, and shades beside it.
  handle(name, side) {
    const made = html("div", {
      class: `handle ${name}`, role: "slider", tabindex: 0, "aria-label": `${name} of the selected range`,
      "aria-valuemin": 0, "aria-valuemax": this.test.duration,
    });
    made.addEventListener("keydown", (event) => {
      const step = (this.view[1] - this.view[0]) / (event.shiftKey ? 10 : 100);
      const now = (this.range ?? this.view)[side];
      const to = { ArrowLeft: now - step, ArrowRight: now + step, ArrowDown: now - step, ArrowUp: now + step,
        PageDown: now - 10 * step, PageUp: now + 10 * step, Home: 0, End: this.test.duration }[event.key];
      if (to === undefined || event.ctrlKey || event.altKey) return;
      event.preventDefault();
      this.moveEnd(side, to);
    });
    return made;
  }

  moveEnd(side, time) {
    const range = [...(this.range ?? this.view)];
    range[side] = side ? clamp(time, range[0], this.test.duration) : clamp(time, 0, range[1]);
    this.select(range);
  }

  press(event) {
    if (event.button !== 0) return;
    const handle = this.handles.indexOf(event.target), start = this.time(event), from = event.clientX;
    const target = event.target.closest("[data-record]");
    let dragged = false;
    const move = (moved) => {
      dragged ||= Math.abs(moved.clientX - from) > 4;
      if (!dragged) return;
      const now = this.time(moved);
      if (handle >= 0) this.moveEnd(handle, now);
      else this.select([Math.min(start, now), Math.max(start, now)]);
    };
    const release = () => {
      removeEventListener("pointermove", move);
      removeEventListener("pointerup", release);
      removeEventListener("pointercancel", release);
      if (dragged || handle >= 0) return;
      if (target) this.choose(this.test.records[Number(target.dataset.record)]);
      else this.select(null);
    };
    addEventListener("pointermove", move);
    addEventListener("pointerup", release);
    addEventListener("pointercancel", release);
    if (handle < 0) event.preventDefault();
  }

  hover(event) {
    const time = this.time(event);
    this.cursor.hidden = false;
    this.cursor.style.left = `${this.x(time)}px`;
    this.cursor.firstChild.textContent = at(time) + (this.test.started ? `  ${clock(this.test.started + time)}` : "");
    this.cursor.classList.toggle("left", this.x(time) > this.box.clientWidth - 190);
  }

  wheel(event) {
    if (!event.ctrlKey) return;
    event.preventDefault();
    const middle = this.time(event), factor = event.deltaY < 0 ? 0.8 : 1.25;
    this.zoom(this.view.map((edge) => middle + (edge - middle) * factor));
  }

  zoom([from, to]) {
    const begin = clamp(from, 0, this.test.duration), until = clamp(to, begin, this.test.duration);
    if (until - begin < 1e-4) return;
    this.view = [begin, until];
    this.draw();
  }

  setRange(range) {
    this.range = range;
    this.mark();
  }

  setChosen(record) {
    this.chosen = record;
    const [from, to] = this.view;
    if (record && (record.t > to || end(record, this.test) < from)) this.view = [0, this.test.duration];
    this.draw();
  }

  mark() {
    const [from, to] = this.range ?? this.view;
    const width = this.box.clientWidth, right = width - 14;
    const left = clamp(this.x(from), this.gutter, right), until = clamp(this.x(to), this.gutter, right);
    const edges = [[this.gutter, left], [until, right]];
    this.shades.forEach((shade, side) => {
      shade.style.left = `${edges[side][0]}px`;
      shade.style.width = `${Math.max(0, edges[side][1] - edges[side][0])}px`;
    });
    [[left, from], [until, to]].forEach(([x, time], side) => {
      this.handles[side].style.left = `${x}px`;
      this.handles[side].setAttribute("aria-valuenow", time.toFixed(3));
      this.handles[side].setAttribute("aria-valuetext", at(time));
    });
  }
}
