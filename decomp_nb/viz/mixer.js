// <decomp-mixer>: a mixing desk that needs no kernel. Every picture that it can show was drawn beforehand and lies in one sprite:
// the two sources, one thumbnail for each button, then the result for every set of pressed buttons, counted in binary.
// Its child <img> is the sprite; without JavaScript, that is what one sees.
(() => {
  "use strict";
  if (customElements.get("decomp-mixer")) return;

  const STYLE = `
    :host { display: block; max-width: 42rem; margin: 1.2rem auto; font: inherit; }
    .desk { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-end; justify-content: center; }
    figure { margin: 0; text-align: center; font-size: .85em; }
    canvas { display: block; background: #eeeeea; border-radius: 6px; }
    .source canvas { width: clamp(72px, 20vw, 128px); aspect-ratio: 1; }
    .result canvas { width: clamp(160px, 46vw, 288px); aspect-ratio: 1; }
    .group { margin-top: .8rem; text-align: center; }
    .group p { margin: 0 0 .3rem; font-size: .85em; opacity: .85; }
    .buttons { display: flex; flex-wrap: wrap; gap: .4rem; justify-content: center; }
    button { font: inherit; font-size: .8em; color: inherit; background: transparent; cursor: pointer; touch-action: manipulation;
             border: 2px solid rgba(128, 128, 128, .4); border-radius: 8px; padding: 4px; min-width: 72px; min-height: 44px; }
    button canvas { width: 60px; aspect-ratio: 1; margin: 0 auto 2px; opacity: .45; }
    button[aria-pressed="true"] { border-color: #3b6ea8; box-shadow: 0 0 0 1px #3b6ea8; }
    button[aria-pressed="true"] canvas { opacity: 1; }
    button:focus-visible { outline: 3px solid #f2a33a; outline-offset: 2px; }
    .more { margin-top: .7rem; text-align: center; font-size: .85em; }
    .more button { padding: .2em .9em; margin: 0 .2em; }
    [role="status"] { margin: .5rem 0 0; min-height: 1.4em; text-align: center; font-size: .85em; opacity: .85; }`;

  class DecompMixer extends HTMLElement {
    connectedCallback() {
      if (this.shadowRoot) return;
      const sprite = this.querySelector("img");
      if (!sprite) {  // the parser has not come to it yet
        if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", () => this.connectedCallback(), { once: true });
        return;
      }
      const data = this.dataset;
      this.side = Number(data.side);
      this.columns = Number(data.columns);
      this.labels = JSON.parse(data.labels);
      this.groups = JSON.parse(data.groups);
      this.start = Number(data.start || 0);
      this.pressed = this.start;
      this.build();
      sprite.hidden = true;
      this.sheet = sprite;
      if (sprite.complete) this.drawAll();
      else sprite.addEventListener("load", () => this.drawAll(), { once: true });
    }

    disconnectedCallback() { this.stop(); }

    build() {
      const root = this.attachShadow({ mode: "open" });
      root.innerHTML = `<style>${STYLE}</style><div class="desk"></div><div class="groups"></div>
        <div class="more"><button class="play" type="button">Play</button><button class="reset" type="button">Start again</button></div>
        <p role="status" aria-live="polite"></p>`;
      const desk = root.querySelector(".desk");
      this.tiles = [];
      this.screen = this.figure(desk, "result", "mixed", 2 + this.labels.length + this.pressed, 288);
      const [first, second] = ["first picture", "second picture"];
      desk.prepend(this.figure(desk, "source", first, 0, 128).parentElement);
      this.figure(desk, "source", second, 1, 128);
      this.buttons = [];
      let at = 0;
      for (const [title, count] of this.groups) this.group(root.querySelector(".groups"), title, at, at += count);
      root.querySelector(".play").onclick = () => (this.timer ? this.stop() : this.play());
      root.querySelector(".reset").onclick = () => { this.stop(); this.show(this.start); };
      root.addEventListener("keydown", (event) => this.move(event));
      this.status = root.querySelector("[role=status]");
    }

    canvas(tile, size) {
      const canvas = document.createElement("canvas");
      canvas.width = canvas.height = size * 2;
      this.tiles.push([canvas, tile]);
      return canvas;
    }

    figure(desk, kind, caption, tile, size) {
      const figure = document.createElement("figure");
      figure.className = kind;
      const canvas = this.canvas(tile, size);
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", caption);
      const words = document.createElement("figcaption");
      words.textContent = caption;
      figure.append(canvas, words);
      desk.append(figure);
      return canvas;
    }

    group(place, title, from, to) {
      const group = document.createElement("div");
      group.className = "group";
      group.setAttribute("role", "group");
      group.setAttribute("aria-label", title);
      const head = document.createElement("p");
      head.textContent = title;
      const row = document.createElement("div");
      row.className = "buttons";
      for (let i = from; i < to; i++) {
        const button = document.createElement("button");
        button.type = "button";
        const thumbnail = this.canvas(2 + i, 60);
        thumbnail.setAttribute("aria-hidden", "true");
        button.append(thumbnail, this.labels[i]);
        button.onclick = () => { this.stop(); this.show(this.pressed ^ (1 << i)); };
        this.buttons.push(button);
        row.append(button);
      }
      group.append(head, row);
      place.append(group);
    }

    draw(canvas, tile) {
      const across = tile % this.columns, down = Math.floor(tile / this.columns);
      const context = canvas.getContext("2d");
      const crisp = "crisp" in this.dataset;
      context.imageSmoothingEnabled = !crisp;
      context.imageSmoothingQuality = "high";
      const rim = crisp ? 0 : 0.5;  // stays away, so that neighbours do not shine in
      const inside = this.side - 2 * rim;
      context.drawImage(this.sheet, across * this.side + rim, down * this.side + rim, inside, inside, 0, 0, canvas.width, canvas.height);
    }

    drawAll() {
      for (const [canvas, tile] of this.tiles) this.draw(canvas, tile);
      this.ready = true;
      this.show(this.pressed);
      this.dispatchEvent(new Event("ready"));
    }

    show(pressed) {
      this.pressed = pressed;
      this.buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(Boolean(pressed & (1 << i)))));
      const words = this.words(pressed);
      this.screen.setAttribute("aria-label", words);
      if (!this.timer) this.status.textContent = words;
      if (this.ready) this.draw(this.screen, 2 + this.labels.length + pressed);
      this.dispatchEvent(new CustomEvent("mix", { detail: pressed }));
    }

    words(pressed) {
      let at = 0;
      const said = this.groups.map(([title, count]) => {
        const chosen = this.labels.slice(at, at + count).filter((_, i) => pressed & (1 << (at + i)));
        at += count;
        return `${title}: ${chosen.join(", ") || "nothing"}`;
      });
      return said.join("; ");
    }

    move(event) {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const here = this.buttons.indexOf(this.shadowRoot.activeElement);
      if (!step || here < 0) return;
      event.preventDefault();
      this.buttons[(here + step + this.buttons.length) % this.buttons.length].focus();
    }

    play() {
      this.timer = setInterval(() => this.show(this.pressed ^ (1 << Math.floor(Math.random() * this.labels.length))), 900);
      this.shadowRoot.querySelector(".play").textContent = "Stop";
    }

    stop() {
      clearInterval(this.timer);
      this.timer = 0;
      const button = this.shadowRoot && this.shadowRoot.querySelector(".play");
      if (button) button.textContent = "Play";
    }
  }

  customElements.define("decomp-mixer", DecompMixer);
})();
