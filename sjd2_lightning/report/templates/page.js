"use strict";
// The page's only script: a large view of two methods side by side, and the replay of a decoding.
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

// --- two methods on one prompt ---
const zoom = { prompt: 0, methods: [0, 0] };

function showZoom() {
  const prompt = data.prompts[zoom.prompt], view = chosen("zoom-view");
  element("zoom-title").textContent = prompt.caption;
  zoom.methods.forEach((method, side) => {
    const source = element(`${view}-${zoom.prompt}-${method}`), image = element(`zoom-image-${side}`);
    const numbers = prompt.images[method];
    image.src = source.src;
    image.alt = source.alt;
    image.style.imageRendering = source.naturalWidth <= 256 ? "pixelated" : "auto";
    element(`zoom-method-${side}`).value = method;
    element(`zoom-text-${side}`).textContent =
      `${numbers.nfe} passes, ${numbers.compression.toFixed(2)} tokens a pass` +
      (numbers.clip === null ? "" : `, CLIP ${numbers.clip.toFixed(1)}`) +
      (numbers.judge === null ? "" : `; judge: ${numbers.judge}`);
  });
  const [a, b] = zoom.methods, equal = prompt.equal[a][b];
  element("zoom-verdict").textContent =
    a === b ? "Choose another method on one side to compare."
    : equal === 100 ? `${data.methods[a]} and ${data.methods[b]} drew the same image, token for token (seed ${prompt.seed}).`
    : `${equal} % of the tokens of ${data.methods[a]} and ${data.methods[b]} are equal (seed ${prompt.seed}).`;
}

function turn(by) {
  zoom.prompt = (zoom.prompt + by + data.prompts.length) % data.prompts.length;
  showZoom();
}

document.querySelectorAll(".open").forEach((button) => {
  button.addEventListener("click", () => {
    const method = Number(button.dataset.method);
    zoom.prompt = Number(button.dataset.prompt);
    zoom.methods = method === 0 ? [0, Math.min(1, data.methods.length - 1)] : [0, method];
    showZoom();
    element("zoom").showModal();
  });
});
[0, 1].forEach((side) => element(`zoom-method-${side}`).addEventListener("change", (event) => {
  zoom.methods[side] = Number(event.target.value);
  showZoom();
}));
document.querySelectorAll('input[name="zoom-view"]').forEach((input) => input.addEventListener("change", showZoom));
element("zoom-previous").addEventListener("click", () => turn(-1));
element("zoom-next").addEventListener("click", () => turn(1));
element("zoom-close").addEventListener("click", () => element("zoom").close());
element("zoom").addEventListener("click", (event) => { if (event.target === element("zoom")) element("zoom").close(); });
element("zoom").addEventListener("keydown", (event) => {
  if (event.target.matches("select, input")) return;
  if (event.key === "ArrowLeft") turn(-1);
  if (event.key === "ArrowRight") turn(1);
});
document.querySelectorAll(".picture").forEach((image) => {
  const mark = () => image.classList.toggle("small-image", image.naturalWidth <= 256);
  if (image.complete) mark(); else image.addEventListener("load", mark);
});

// --- replay ---
const STEPS = 1000, PLAY_SECONDS = 14;
const replay = { tiles: [], entry: null, playing: false, last: 0, exact: 0 };

function passesDone(method, moment) {
  const done = chosen("clock") === "passes" ? moment
    : Math.floor(moment / STEPS * longest("seconds") / method.seconds + 1e-6);
  return Math.min(method.passes, done);
}

function longest(unit) {
  return Math.max(...replay.entry.methods.map((m) => (unit === "passes" ? m.passes : m.passes * m.seconds)));
}

// Rectangles of the codes from..to-1 in raster order, in units of codes.
function rectangles(from, to, width) {
  const found = [];
  for (let code = from; code < to;) {
    const x = code % width, run = Math.min(width - x, to - code);
    found.push([x, Math.floor(code / width), run, 1]);
    code += run;
  }
  return found;
}

function paint(tile, done) {
  const { method, canvas, context, sprite } = tile, [height, width] = replay.entry.size, cell = tile.cell;
  const style = getComputedStyle(document.documentElement);
  let frame = -1;
  while (frame + 1 < method.frames.length && method.frames[frame + 1] < done) frame += 1;
  context.clearRect(0, 0, canvas.width, canvas.height);
  const committed = done ? method.committed[done - 1] : 0;
  tile.text.textContent = done === method.passes ? `done in ${done} passes` : `pass ${done}: ${Math.round(100 * committed / (width * height))} %`;
  tile.text.classList.toggle("done", done === method.passes);
  if (frame < 0) return;
  const pass = method.frames[frame], start = method.committed[pass], end = method.seen[pass];
  context.save();
  context.beginPath();
  rectangles(0, end, width).forEach((r) => context.rect(...r.map((v) => v * cell)));
  context.clip();
  const [w, h] = method.frame_size;
  context.imageSmoothingEnabled = w > canvas.width;
  context.drawImage(sprite, frame % method.in_row * w, Math.floor(frame / method.in_row) * h, w, h, 0, 0, canvas.width, canvas.height);
  context.restore();
  for (let code = start; code < end; code += 1) {
    context.fillStyle = style.getPropertyValue(method.levels[frame][code - start] > "0" ? "--noisy" : "--draft");
    context.fillRect(code % width * cell, Math.floor(code / width) * cell, cell, cell);
  }
  context.strokeStyle = style.getPropertyValue("--accent");
  context.lineWidth = Math.max(1.5, cell / 9);
  context.beginPath();
  const inside = (x, y) => x >= 0 && x < width && y >= 0 && y * width + x >= start && y * width + x < end;
  for (let code = start; code < end; code += 1) {
    const x = code % width, y = Math.floor(code / width);
    const edge = (dx, dy, ax, ay, bx, by) => {
      if (inside(x + dx, y + dy)) return;
      context.moveTo((x + ax) * cell, (y + ay) * cell);
      context.lineTo((x + bx) * cell, (y + by) * cell);
    };
    edge(0, -1, 0, 0, 1, 0); edge(0, 1, 0, 1, 1, 1); edge(-1, 0, 0, 0, 0, 1); edge(1, 0, 1, 0, 1, 1);
  }
  context.stroke();
}

function paintAll() {
  const slider = element("replay-slider"), moment = Number(slider.value);
  replay.tiles.forEach((tile) => paint(tile, passesDone(tile.method, moment)));
  const text = chosen("clock") === "passes" ? `pass ${moment} of ${slider.max}`
    : `${(moment / STEPS * longest("seconds")).toFixed(2)} of ${longest("seconds").toFixed(2)} s`;
  element("replay-time").textContent = text;
  slider.setAttribute("aria-valuetext", text);
}

function play(on) {
  replay.playing = on;
  element("replay-play").textContent = on ? "Pause" : "Play";
  if (!on) return;
  const slider = element("replay-slider");
  if (slider.value === slider.max) slider.value = 0;
  replay.exact = Number(slider.value);
  replay.last = performance.now();
  requestAnimationFrame(advance);
}

function advance(now) {
  if (!replay.playing) return;
  const slider = element("replay-slider"), most = Number(slider.max);
  replay.exact += (now - replay.last) / 1000 * most / PLAY_SECONDS;
  replay.last = now;
  slider.value = Math.min(most, Math.floor(replay.exact));
  paintAll();
  if (replay.exact >= most) play(false); else requestAnimationFrame(advance);
}

function makeTile(method, width, height) {
  const figure = document.createElement("figure"), canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption"), name = document.createElement("b"), text = document.createElement("span");
  const cell = Math.max(4, Math.floor(320 / width));
  figure.className = "tile";
  canvas.width = width * cell;
  canvas.height = height * cell;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `${method.name}, partly decoded`);
  name.textContent = method.name;
  caption.append(name, document.createElement("br"), text);
  figure.append(canvas, caption);
  const sprite = new Image();
  sprite.addEventListener("load", paintAll);
  sprite.src = method.sprite;
  return { method, canvas, context: canvas.getContext("2d"), sprite, text, cell, figure };
}

// The slider starts where the fastest method is half done.
function setClock() {
  const slider = element("replay-slider"), methods = replay.entry.methods, passes = chosen("clock") === "passes";
  slider.max = passes ? longest("passes") : STEPS;
  const fastest = Math.min(...methods.map((m) => (passes ? m.passes : m.passes * m.seconds / longest("seconds") * STEPS)));
  slider.value = Math.round(fastest / 2);
  play(false);
  paintAll();
}

function choosePrompt() {
  replay.entry = data.replays[Number(element("replay-prompt").value)];
  const [height, width] = replay.entry.size;
  replay.tiles = replay.entry.methods.map((method) => makeTile(method, width, height));
  element("replay-tiles").replaceChildren(...replay.tiles.map((tile) => tile.figure));
  setClock();
}

if (data.replays.length) {
  element("replay-slider").addEventListener("input", () => { play(false); paintAll(); });
  element("replay-play").addEventListener("click", () => play(!replay.playing));
  element("replay-prompt").addEventListener("change", choosePrompt);
  document.querySelectorAll('input[name="clock"]').forEach((input) => input.addEventListener("change", setClock));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintAll);
  choosePrompt();
}
