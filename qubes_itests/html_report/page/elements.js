// Elements, and words for times and sizes. Text of guests only ever becomes text nodes.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children.flat().filter((child) => child !== null && child !== ""));
  return element;
}

function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function button(text, act, attributes = {}) {
  const made = html("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", act);
  return made;
}

const MARKS = {
  passed: "✓", failed: "✗", error: "✗", skipped: "–",
  xfailed: "✓", xpassed: "!", flaky: "≈", interrupted: "✗", unfinished: "…",
};
const BAD = new Set(["failed", "error", "flaky", "xpassed", "interrupted", "unfinished"]);

function badge(outcome = "unknown") {
  const mark = html("span", { "aria-hidden": "true" }, MARKS[outcome] ?? "?");
  return html("span", { class: "badge", "data-outcome": outcome }, mark, ` ${outcome}`);
}

// Seconds, with as many digits as say something.
function took(seconds) {
  if (seconds === undefined || seconds === null) return "";
  if (seconds >= 3600) return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
  if (seconds >= 100) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  if (seconds >= 10) return `${seconds.toFixed(1)} s`;
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  return `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
}

function at(seconds) {
  return `${seconds.toFixed(3)} s`;
}

function clock(unix, withDate = false) {
  const time = new Date(unix * 1000);
  if (Number.isNaN(time.getTime())) return "";
  const text = new Date(time - time.getTimezoneOffset() * 60000).toISOString();
  return withDate ? `${text.slice(0, 10)} ${text.slice(11, 19)}` : text.slice(11, 23);
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return "";
  if (bytes < 1024) return `${bytes} B`;
  return bytes < 1 << 20 ? `${(bytes / 1024).toFixed(0)} KiB` : `${(bytes / (1 << 20)).toFixed(1)} MiB`;
}

function firstLine(text) {
  return (text ?? "").trimStart().split("\n", 1)[0];
}

function clamp(value, least, most) {
  return Math.min(Math.max(value, least), most);
}
