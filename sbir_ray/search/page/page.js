// The drawing page: strokes in, the nearest photos out after each of them.

const SIDE = 256; // of the canvas, in the units of strokes
const WIDTH = 2.5; // of a stroke
const NEAR = 0.7; // points nearer than this to the last one are left out
const STEP = 4, FAR = 16; // of the arrow keys
const KEPT = "sbir_ray.drawing";

const $ = (id) => document.getElementById(id);
const paper = $("paper"), pen = paper.getContext("2d");

let strokes = kept(); // [[[x, y], ...], ...]
let undone = [];
let drawing = null; // the stroke that is being drawn
let cursor = null; // the keyboard's pen, [x, y]
let places = new Map(); // of the photos shown, by id
let chosen = null; // {photo_id, name}
let lit = -1; // number of the stroke that is shown in colour
let asked = null; // AbortController of the search under way

// ---------------------------------------------------------------- the drawing

function kept() {
  try {
    const found = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
    found.forEach((stroke) => stroke.forEach(([x, y]) => x.toFixed(1) + y.toFixed(1)));
    return [...found];
  } catch {
    return [];
  }
}

function paint() {
  const scale = (paper.clientWidth * devicePixelRatio) / SIDE;
  const side = Math.round(SIDE * scale);
  if (paper.width !== side || paper.height !== side) paper.width = paper.height = side;
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, SIDE, SIDE);
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = WIDTH;
  [...strokes, ...(drawing ? [drawing] : [])].forEach((stroke, number) => {
    pen.strokeStyle = number === lit ? "#0b66c3" : "#111";
    pen.beginPath();
    stroke.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
    pen.stroke();
  });
  if (cursor && document.activeElement === paper) {
    const [x, y] = cursor;
    pen.strokeStyle = drawing ? "#0b66c3" : "#888";
    pen.lineWidth = 1;
    pen.beginPath();
    pen.arc(x, y, 5, 0, 2 * Math.PI);
    pen.stroke();
  }
  $("undo").disabled = $("clear").disabled = $("save").disabled = !strokes.length;
  $("redo").disabled = !undone.length;
}

function changed() {
  lit = -1;
  sessionStorage.setItem(KEPT, JSON.stringify(strokes));
  paint();
  search();
}

function add(stroke) {
  if (stroke.length === 1) stroke.push([stroke[0][0] + 0.5, stroke[0][1]]); // a dot
  strokes = [...strokes, stroke];
  undone = [];
  changed();
}

function undo() {
  if (!strokes.length) return;
  undone.push(strokes[strokes.length - 1]);
  strokes = strokes.slice(0, -1);
  changed();
}

function redo() {
  if (!undone.length) return;
  strokes = [...strokes, undone.pop()];
  changed();
}

function clear() {
  if (!strokes.length) return;
  undone = [...strokes].reverse(); // redo brings it back, stroke by stroke
  strokes = [];
  changed();
}

function save() {
  const path = (stroke) => "M" + stroke.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
  const paths = strokes.map((stroke) => `<path d="${path(stroke)}"/>`).join("");
  const text = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${SIDE} ${SIDE}" fill="none" stroke="#000" ` +
    `stroke-width="${WIDTH}" stroke-linecap="round" stroke-linejoin="round">${paths}</svg>\n`;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  link.download = "drawing.svg";
  link.click();
  URL.revokeObjectURL(link.href);
}

// ---------------------------------------------------------------- mouse, pen, finger

function point(event) {
  const box = paper.getBoundingClientRect();
  const within = (at, start, size) => Math.min(SIDE, Math.max(0, ((at - start) * SIDE) / size));
  return [within(event.clientX, box.left, box.width), within(event.clientY, box.top, box.height)];
}

function goOn(to) {
  const last = drawing[drawing.length - 1];
  if (Math.hypot(to[0] - last[0], to[1] - last[1]) >= NEAR) drawing.push(to);
}

paper.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button) return;
  event.preventDefault();
  paper.focus({ preventScroll: true });
  paper.setPointerCapture(event.pointerId);
  cursor = null;
  drawing = [point(event)];
  paint();
});

paper.addEventListener("pointermove", (event) => {
  if (!drawing || cursor || !event.isPrimary) return;
  const events = event.getCoalescedEvents?.() ?? [];
  (events.length ? events : [event]).forEach((one) => goOn(point(one)));
  paint();
});

function lifted(event) {
  if (!drawing || cursor || !event.isPrimary) return;
  const stroke = drawing;
  drawing = null;
  add(stroke); // also one that the system broke off: undo is near
}
paper.addEventListener("pointerup", lifted);
paper.addEventListener("pointercancel", lifted);

// ---------------------------------------------------------------- keyboard

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

paper.addEventListener("keydown", (event) => {
  const arrow = ARROWS[event.key];
  if (arrow) {
    const step = event.shiftKey ? FAR : STEP;
    const [x, y] = cursor ?? [SIDE / 2, SIDE / 2];
    const moved = (at, by) => Math.min(SIDE, Math.max(0, at + by * step));
    cursor = [moved(x, arrow[0]), moved(y, arrow[1])];
    if (drawing) goOn(cursor);
  } else if (event.key === " ") {
    cursor ??= [SIDE / 2, SIDE / 2];
    const stroke = drawing;
    drawing = stroke ? null : [[...cursor]];
    if (stroke) add(stroke);
  } else {
    return;
  }
  event.preventDefault();
  paint();
});

document.addEventListener("keydown", (event) => {
  const key = event.key.toLowerCase(), command = event.ctrlKey || event.metaKey;
  if (command && key === "z") (event.shiftKey ? redo : undo)();
  else if (command && key === "y") redo();
  else if (event.key === "Delete") clear();
  else if (event.key === "Escape") choose(null);
  else return;
  event.preventDefault();
});

// ---------------------------------------------------------------- what is found

async function ask(path, body, signal) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  };
  const answer = await fetch(path, options);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function tell(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

async function search() {
  asked?.abort();
  asked = null;
  if (!strokes.length) {
    show([]);
    tell("Draw something.");
    return;
  }
  const mine = (asked = new AbortController());
  try {
    const { found, photos, seconds } = await ask("api/search", { strokes, top: 48 }, mine.signal);
    if (mine !== asked) return;
    show(found);
    const plural = strokes.length > 1 ? "strokes" : "stroke";
    tell(`${strokes.length} ${plural}, ${photos.toLocaleString("en")} photos compared in ${Math.ceil(seconds * 1000)} ms.`);
  } catch (error) {
    if (error.name === "AbortError" || mine !== asked) return;
    const gone = error instanceof TypeError;
    tell(gone ? "The server does not answer; is it still running?" : error.message, true);
  }
}

function show(found) {
  const before = places;
  places = new Map(found.map((hit, i) => [hit.photo_id, i + 1]));
  $("empty").hidden = found.length > 0;
  $("found").replaceChildren(...found.map((hit, i) => card(hit, i + 1, before)));
  if (chosen) story();
}

function card(hit, place, before) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.id = hit.photo_id;
  button.setAttribute("aria-pressed", String(chosen?.photo_id === hit.photo_id));
  const name = hit.name || hit.photo_id.slice(0, 12);
  const image = document.createElement("img");
  image.src = `photos/${hit.photo_id}`;
  image.alt = "";
  image.decoding = "async";
  image.draggable = false;
  const was = before.get(hit.photo_id);
  const up = was === undefined || was > place;
  const moved = !before.size || was === place ? "" : was === undefined ? "new" : `${up ? "▲" : "▼"} ${Math.abs(was - place)}`;
  const line = part("span", "line", part("strong", "", String(place)), part("span", up ? "moved up" : "moved", moved));
  line.append(part("span", "", hit.similarity.toFixed(2)));
  const label = part("span", "name", name);
  label.title = name;
  button.append(image, line, label);
  button.addEventListener("click", () => choose(chosen?.photo_id === hit.photo_id ? null : { photo_id: hit.photo_id, name }));
  const item = document.createElement("li");
  item.append(button);
  return item;
}

function part(tag, kind, ...inside) {
  const made = document.createElement(tag);
  made.className = kind;
  made.append(...inside);
  return made;
}

// ---------------------------------------------------------------- how each stroke moved a photo

function choose(photo) {
  chosen = photo;
  lit = -1;
  for (const button of $("found").querySelectorAll("button"))
    button.setAttribute("aria-pressed", String(button.dataset.id === photo?.photo_id));
  paint();
  story();
}

async function story() {
  if (!chosen || !strokes.length) {
    $("story").hidden = true;
    return;
  }
  const { photo_id, name } = chosen, count = strokes.length;
  let ranks;
  try {
    ({ ranks } = await ask("api/ranks", { strokes, photo_id }));
  } catch (error) {
    tell(error.message, true);
    return;
  }
  if (chosen?.photo_id !== photo_id || strokes.length !== count) return; // since then it went on
  const gains = ranks.map((rank, i) => (i ? ranks[i - 1] / rank : 1));
  const most = gains.indexOf(Math.max(...gains));
  $("whose").textContent = `${name}: its rank after each stroke`;
  $("ranks").replaceChildren(
    ...ranks.map((rank, i) => {
      const button = part("button", gains[i] > 1 && i === most ? "most" : "", String(rank));
      button.type = "button";
      button.setAttribute("aria-label", `after stroke ${i + 1}: rank ${rank}`);
      for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => light(i));
      for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => light(-1));
      return part("li", "", button);
    }),
  );
  $("best").textContent = gains[most] > 1 ? `Stroke ${most + 1} helped most: from ${ranks[most - 1]} to ${ranks[most]}.` : "";
  $("story").hidden = false;
}

function light(number) {
  lit = number;
  paint();
}

// ---------------------------------------------------------------- begin

$("undo").addEventListener("click", undo);
$("redo").addEventListener("click", redo);
$("clear").addEventListener("click", clear);
$("save").addEventListener("click", save);
for (const event of ["focus", "blur"]) paper.addEventListener(event, paint);
new ResizeObserver(paint).observe(paper);
paint();
search();
ask("api/index")
  .then(({ photos, weights, folder, fits }) => {
    $("about").textContent = `${photos.toLocaleString("en")} photos in ${folder}, by weights ${weights}.`;
    if (!fits) tell("The index was made anew by other weights; start serve again to search it.", true);
  })
  .catch((error) => tell(error.message, true));
