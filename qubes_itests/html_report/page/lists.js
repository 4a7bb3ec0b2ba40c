// Lists of any length, of which only those rows exist that are seen.

class List {
  // box: what scrolls; height: of a row, in pixels; row(item): its content;
  // choose(item): somebody chose it; open(item): pressed Enter on it.
  constructor(box, { label, height, row, choose, open = () => {}, empty = "nothing" }) {
    Object.assign(this, { box, height, row, choose, open, empty });
    this.items = [];
    this.chosen = -1;
    this.inner = html("div", { class: "rows", role: "presentation" });
    fill(box, { role: "listbox", tabindex: 0, "aria-label": label }, [this.inner]);
    box.addEventListener("scroll", () => this.draw());
    box.addEventListener("keydown", (event) => this.key(event));
    box.addEventListener("click", (event) => {
      const row = event.target.closest("[data-row]");
      if (row) this.select(Number(row.dataset.row));
    });
    box.addEventListener("dblclick", () => this.item && this.open(this.item));
    new ResizeObserver(() => this.draw()).observe(box);
  }

  get item() {
    return this.items[this.chosen];
  }

  show(items, chosen = undefined) {
    this.items = items;
    this.chosen = items.indexOf(chosen);
    this.drawn = null;
    this.draw();
  }

  // Mark an item as chosen without telling anybody.
  mark(item) {
    this.chosen = this.items.indexOf(item);
    this.drawn = null;
    this.reveal(this.chosen);
    this.draw();
  }

  select(index) {
    if (!this.items.length) return;
    this.chosen = clamp(index, 0, this.items.length - 1);
    this.drawn = null;
    this.reveal(this.chosen);
    this.draw();
    this.choose(this.item);
  }

  reveal(index) {
    if (index < 0) return;
    const top = index * this.height, { scrollTop, clientHeight } = this.box;
    if (top < scrollTop) this.box.scrollTop = top;
    else if (top + this.height > scrollTop + clientHeight) {
      this.box.scrollTop = top + this.height - clientHeight;
    }
  }

  key(event) {
    if (event.target !== this.box || event.ctrlKey || event.altKey || event.metaKey) return;
    const page = Math.max(1, Math.floor(this.box.clientHeight / this.height) - 1);
    const to = {
      ArrowDown: this.chosen + 1, ArrowUp: this.chosen - 1, Home: 0, End: Infinity,
      PageDown: this.chosen + page, PageUp: this.chosen - page,
    }[event.key];
    if (to !== undefined) this.select(to);
    else if (event.key === "Enter" && this.item) this.open(this.item);
    else return;
    event.preventDefault();
  }

  draw() {
    const first = Math.max(0, Math.floor(this.box.scrollTop / this.height) - 4);
    const number = Math.ceil(this.box.clientHeight / this.height) + 8;
    const last = Math.min(this.items.length, first + number);
    const now = `${first} ${last} ${this.chosen}`;
    if (now === this.drawn) return;
    this.drawn = now;
    this.inner.style.height = `${Math.max(1, this.items.length) * this.height}px`;
    const rows = [];
    for (let index = first; index < last; index++) {
      const row = html("div", {
        class: "item", role: "option", id: `${this.box.id}-${index}`, "data-row": index,
        "aria-selected": index === this.chosen ? "true" : "false",
        "aria-setsize": this.items.length, "aria-posinset": index + 1,
      });
      row.style.top = `${index * this.height}px`;
      row.style.height = `${this.height}px`;
      this.row(this.items[index], row);
      rows.push(row);
    }
    if (!this.items.length) rows.push(html("div", { class: "empty" }, this.empty));
    this.inner.replaceChildren(...rows);
    const seen = this.chosen >= first && this.chosen < last;
    if (seen) this.box.setAttribute("aria-activedescendant", `${this.box.id}-${this.chosen}`);
    else this.box.removeAttribute("aria-activedescendant");
  }
}
