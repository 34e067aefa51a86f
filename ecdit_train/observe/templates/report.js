// The slider over sample grids; it keeps its place when the section is made anew.
const samples = { at: null };
samples.start = () => {
  const box = document.querySelector('.slides');
  if (!box) return;
  const slides = [...box.querySelectorAll('.slide')], bar = box.querySelector('.slider');
  if (slides.length < 2) return;
  const range = bar.querySelector('input'), out = bar.querySelector('output'), play = bar.querySelector('button');
  let timer = null;
  const show = n => {
    slides.forEach((s, i) => s.classList.toggle('on', i === n));
    range.value = n;
    range.setAttribute('aria-valuetext', slides[n].dataset.label);
    out.textContent = slides[n].dataset.label;
    samples.at = n === slides.length - 1 ? null : slides[n].dataset.label;
  };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = 'Play'; };
  box.classList.add('live');
  bar.hidden = false;
  range.addEventListener('input', () => { stop(); show(+range.value); });
  play.addEventListener('click', () => {
    if (timer) return stop();
    play.textContent = 'Pause';
    if (+range.value === slides.length - 1) show(0);
    timer = setInterval(() => {
      if (!box.isConnected) return clearInterval(timer);
      return +range.value < slides.length - 1 ? show(+range.value + 1) : stop();
    }, 700);
  });
  const kept = slides.findIndex(s => s.dataset.label === samples.at);
  show(kept < 0 ? slides.length - 1 : kept);
};
samples.start();
