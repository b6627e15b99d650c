// The pad: pointer and keys, tools, the picture, the readout. Runs once for each page, after strokes.js and live.js.
// Text that a person or a server wrote goes through textContent only: Gradio's templates execute what they are given.

const root = element.querySelector(".sp");
const $ = (name) => root.querySelector(".sp-" + name);
const inkCanvas = $("ink"), picture = $("picture"), over = $("over");
const STORE = "sana-sketch";
const ERASER_FACTOR = 4;

// A tab that Gradio reloads (it does so when its server comes back) finds its drawing again.
let kept = {};
try { kept = JSON.parse(sessionStorage.getItem(STORE)) || {}; } catch (error) { console.debug(error); }

const first = props.examples[0];
const sketch = new Sketch(kept.ops || [{ kind: "load", strokes: first.strokes }]);
const view = new Raster(inkCanvas, PAGE, false);
const ink = new Raster(document.createElement("canvas"), props.side, true);
const tool = { erase: false, mirror: false, size: 6 };
let settings = kept.settings || { ...props.settings };
let current = null, held = null, lastBlob = null, times = [];

// ---- the two rasters ------------------------------------------------------------------------------------------------

function fitView() {  // as many pixels as the screen has under the page
  const side = Math.round(Math.min(1536, Math.max(PAGE, inkCanvas.clientWidth * (window.devicePixelRatio || 1))));
  if (side !== view.side) { view.resize(side); view.rebuild(sketch.strokes); view.show(current); }
}
function redraw(now = true) {
  view.rebuild(sketch.strokes);
  ink.rebuild(sketch.strokes);
  changed(now);
}
function changed(now) {
  const count = sketch.strokes.length + (current ? 1 : 0);
  root.dataset.strokes = count;
  root.classList.toggle("is-blank", count === 0);
  $("undo").disabled = !sketch.ops.length;
  $("redo").disabled = !sketch.undone.length;
  if (!current) keep();
  if (now || settings.live) live.touch(now);
}
function keep() {
  const ops = current ? sketch.ops.concat({ kind: "stroke", stroke: current }) : sketch.ops;
  try { sessionStorage.setItem(STORE, JSON.stringify({ ops, settings })); } catch (error) { console.debug(error); }
}

// ---- live pictures --------------------------------------------------------------------------------------------------

const config = window.gradio_config || {};
const live = new Live({
  root: (config.root || location.origin + location.pathname.replace(/\/$/, "")) + (config.api_prefix || "/gradio_api"),
  appId: config.app_id,
  slowMs: props.slow_ms,
  server,
  snapshot: () => {
    ink.show(current);
    const { prompt, style, strength, steps, seed, guidance } = settings;
    const read = readOf(prompt).join("");
    return { ink: ink.ink(), side: ink.side, settings: { prompt: read, style, strength, steps, seed, guidance } };
  },
  onPicture: async (blob, info) => {
    const bitmap = await createImageBitmap(blob);
    if (info.seq < live.shown) return;
    lastBlob = blob;
    paintPicture(bitmap);
    times = times.filter((t) => t > performance.now() - 2000).concat(performance.now());
    const rate = times.length > 2 ? " · " + Math.round((1000 * (times.length - 1)) / (times[times.length - 1] - times[0])) + "/s" : "";
    const model = info.modelMs === null ? "" : "model " + Math.round(info.modelMs) + " ms · ";
    $("times").textContent = model + "total " + Math.round(info.totalMs) + " ms" + rate;
    showStages(info.stages);
    root.dataset.seq = info.seq;
    say(cutNotice().concat(info.notices, live.slow ? ["This machine is slow: the picture follows when the pen is lifted."] : []).join(" "));
  },
  onState: (state, message) => {
    root.dataset.state = state;
    if (state === "offline" && message !== undefined) say((sentence(message) || "No answer from the server.") + " Your drawing is kept; trying again …");
    if (state === "error") say(sentence(message));
  },
  onStale: () => { if (held === null) { keep(); location.reload(); } },
});

function paintPicture(bitmap) {
  const side = Math.max(PAGE, bitmap.width);
  if (picture.width !== side) picture.width = picture.height = side;
  const ctx = picture.getContext("2d");
  ctx.imageSmoothingQuality = "high";
  ctx.drawImage(bitmap, 0, 0, side, side);
}
function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}
const sentence = (text) => text && text[0].toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");

// A stage that took no time this once (a cached prompt) keeps its place, so that nothing jumps while one draws.
const STAGE_NAMES = { controlnet: "ControlNet", jpeg: "JPEG" };
function showStages(stages) {
  const entries = Object.entries(stages).filter(([name]) => name !== "total");
  $("stages").replaceChildren(...entries.map(([name, ms], i) => {
    const item = document.createElement("span"), unit = i === entries.length - 1 ? " ms" : "";
    const text = ms < 0.05 ? "0" : ms < 9.95 ? ms.toFixed(1) : Math.round(ms);
    item.textContent = (STAGE_NAMES[name] || name) + " " + text + unit;
    return item;
  }));
}

// The model's server reads so many characters of a prompt. The rest stays in its box, to be shortened by hand.
const readOf = (prompt) => Array.from(prompt || "").slice(0, props.prompt_chars);
function cutNotice() {
  const came = Array.from(settings.prompt || "").length;
  return came > props.prompt_chars ? ["Only the first " + props.prompt_chars + " of the prompt's " + came + " characters are read."] : [];
}

// ---- settings: Gradio's controls write them, the pad reads them ------------------------------------------------------

function readSettings() {
  const given = (window.sanaSketch || {}).settings;
  if (!given) return;
  const before = JSON.stringify(settings);
  settings = { ...settings, ...given };
  if (JSON.stringify(settings) !== before) { keep(); live.touch(true); }
}
function setControls(values) {  // the other way: an example, a restored tab or a new seed fills the controls
  props.value = { ...settings, ...values };
  settings = { ...settings, ...values };
  trigger("fill");
}
document.addEventListener("sketch:settings", readSettings);

// ---- drawing --------------------------------------------------------------------------------------------------------

function pointOf(event) {
  const box = inkCanvas.getBoundingClientRect();
  const place = (v, from, length) => Math.round((10 * PAGE * (v - from)) / length) / 10;
  const point = [place(event.clientX, box.left, box.width), place(event.clientY, box.top, box.height)];
  if (event.pointerType === "pen" && event.pressure > 0) point.push(Math.round(event.pressure * 100) / 100);
  return point;
}
inkCanvas.addEventListener("pointerdown", (event) => {
  if (held !== null || !event.isPrimary || (event.button !== 0 && event.button !== 5)) return;
  event.preventDefault();
  inkCanvas.focus({ preventScroll: true });
  inkCanvas.setPointerCapture(event.pointerId);
  held = event.pointerId;
  if (!settings.lock) setControls({ seed: Math.floor(Math.random() * 2 ** 31) });
  const erase = tool.erase || event.button === 5;
  current = { size: tool.size * (erase ? ERASER_FACTOR : 1), erase, mirror: tool.mirror, points: [pointOf(event)] };
  view.show(current);
  changed(false);
});
inkCanvas.addEventListener("pointermove", (event) => {
  if (event.pointerId !== held) return;
  const moves = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  for (const move of moves.length ? moves : [event]) {
    const point = pointOf(move), last = current.points[current.points.length - 1];
    if (event.shiftKey) current.points = [current.points[0], point];
    else if (Math.hypot(point[0] - last[0], point[1] - last[1]) >= 1) current.points.push(point);
  }
  if (current.points[0].length !== 3) current.points = current.points.map((p) => p.slice(0, 2));
  view.show(current);
  changed(false);
});
function penUp(event) {
  if (event.pointerId !== held) return;
  const stroke = current;
  held = current = null;
  sketch.do({ kind: "stroke", stroke });
  view.commit(stroke);
  ink.commit(stroke);
  changed(true);
}
inkCanvas.addEventListener("pointerup", penUp);
inkCanvas.addEventListener("pointercancel", penUp);

// ---- tools ----------------------------------------------------------------------------------------------------------

const setTool = (change) => {
  Object.assign(tool, change);
  tool.size = Math.min(24, Math.max(2, tool.size));
  $("pen").setAttribute("aria-pressed", !tool.erase);
  $("eraser").setAttribute("aria-pressed", tool.erase);
  $("mirror").setAttribute("aria-pressed", tool.mirror);
  root.classList.toggle("is-mirror", tool.mirror);
  root.style.setProperty("--sp-pen", tool.size);
  $("size").querySelector("input").value = tool.size;
};
const acts = {
  pen: () => setTool({ erase: false }),
  eraser: () => setTool({ erase: true }),
  mirror: () => setTool({ mirror: !tool.mirror }),
  undo: () => { sketch.undo(); redraw(); },
  redo: () => { sketch.redo(); redraw(); },
  clear: () => { if (sketch.strokes.length) { sketch.do({ kind: "clear" }); redraw(); } },
  help: () => $("keys").showModal(),
  save: download,
};
for (const [name, act] of Object.entries(acts)) $(name).addEventListener("click", () => { if (held === null) act(); });
$("size").querySelector("input").addEventListener("input", (event) => setTool({ size: Number(event.target.value) }));

async function download() {
  if (!lastBlob) return say("There is no picture to download yet.");
  const bitmap = await createImageBitmap(lastBlob);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  const link = document.createElement("a");
  link.href = canvas.toDataURL("image/png");
  link.download = "sana-sketch-" + settings.seed + ".png";
  link.click();
}
function compare(on) {
  $("compare").setAttribute("aria-pressed", on);
  root.classList.toggle("is-comparing", on);
  if (!on) return;
  [over.width, over.height] = [view.side, view.side];
  over.getContext("2d").drawImage(inkCanvas, 0, 0);
}
$("compare").addEventListener("pointerdown", () => compare(true));
for (const name of ["pointerup", "pointerleave", "pointercancel", "blur"]) $("compare").addEventListener(name, () => compare(false));
$("compare").addEventListener("keydown", (event) => { if ([" ", "Enter"].includes(event.key)) { event.preventDefault(); compare(true); } });
$("compare").addEventListener("keyup", () => compare(false));

// ---- examples -------------------------------------------------------------------------------------------------------

for (const example of props.examples) {
  const button = document.createElement("button"), thumb = document.createElement("canvas"), name = document.createElement("span");
  button.type = "button";
  button.className = "sp-example";
  name.textContent = example.title;
  new Raster(thumb, 144, false).rebuild(example.strokes.map((s) => ({ ...s, size: s.size * 2 })));
  thumb.setAttribute("aria-hidden", "true");
  button.append(thumb, name);
  button.addEventListener("click", () => {
    if (held !== null) return;
    sketch.do({ kind: "load", strokes: example.strokes });
    setControls({ prompt: example.prompt, style: example.style, seed: example.seed });
    redraw();
  });
  $("examples").append(button);
}

// ---- keys -----------------------------------------------------------------------------------------------------------

const keys = { b: acts.pen, e: acts.eraser, x: acts.mirror, "?": acts.help,
  "[": () => setTool({ size: tool.size - 1 }), "]": () => setTool({ size: tool.size + 1 }),
  " ": () => { const dice = document.querySelector("#dice"); if (dice) dice.click(); } };
document.addEventListener("keydown", (event) => {
  const at = event.target;
  if (at.closest("input:not([type=range]), textarea, select, [contenteditable], dialog") || held !== null) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.ctrlKey || event.metaKey) {
    if (key === "z") { event.preventDefault(); (event.shiftKey ? acts.redo : acts.undo)(); }
    if (key === "y") { event.preventDefault(); acts.redo(); }
  } else if (key === "a" && !event.repeat) compare(true);
  else if (keys[key] && !event.altKey && !(key === " " && at.closest("button, a, input, summary, label, [role=option]"))) {
    event.preventDefault();
    keys[key]();
  }
});
document.addEventListener("keyup", (event) => { if (event.key.toLowerCase() === "a") compare(false); });

// ---- start ----------------------------------------------------------------------------------------------------------

setTool({});
window.addEventListener("pagehide", keep);
new ResizeObserver(fitView).observe(inkCanvas);
if (props.picture && !kept.ops) {  // the first example's picture came with the page
  const image = new Image();
  image.onload = () => { if (!live.shown) paintPicture(image); };
  image.src = props.picture;
}
fitView();
if (kept.settings) setControls(kept.settings);
else readSettings();
redraw();
