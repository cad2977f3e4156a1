// What the page says, in English and Chinese. An element keeps the name of its text, so that a switch of the language
// says everything again. English that stands in the document is not repeated here.

import { at, make } from "./dom.js";

const EN = {
  again: "Try again",
  againIn: "Try again in {seconds} s",
  batch: "Made together",
  cancelled: "Cancelled",
  copied: "Receipt copied",
  copyFailed: "The browser did not allow it",
  count: "{count} of at most {most}",
  deleteQuestion: "Delete all {count} images?",
  device: "Device",
  done: "Done",
  dtype: "Data type",
  galleryLost: "This browser keeps no images: they are gone when the page is left.",
  load: "{running} running, {waiting} waiting",
  manifest: "Manifest",
  model: "Model",
  negativeShown: "Without: {text}",
  pictureDone: "{done} of {all} done",
  preview: "Preview {index} of {count}",
  queue: "{running} running, {waiting} waiting of at most {limit}",
  revision: "Revision",
  seconds: "Seconds",
  sent: "Working",
  sentWaiting: "In the queue, {waiting} waiting",
  tokens: "Prompt tokens",
  tooManyPixels: "This server makes at most {most} pixels, which is about {edge}×{edge}.",
  truncated: "Prompt was cut",
  unreachable: "The server cannot be reached, or the connection broke.",
  phase_starting: "Starting",
  phase_imports: "Loading libraries",
  phase_verify: "Checking the model",
  phase_read: "Reading the weights",
  phase_build: "Building the pipeline",
  phase_gate: "Judging the preset's images",
  phase_warmup: "Making a first image",
  phase_ready: "Ready",
  phase_busy: "Busy",
  phase_restarting: "Restarting a worker",
  phase_failed: "A worker cannot start",
  phase_draining: "Stopping",
  phase_unreachable: "Unreachable",
};


const ZH = {
  again: "重试",
  againIn: "{seconds} 秒后可重试",
  batch: "同批图片数",
  beginWith: "从一张图片开始…",
  cancel: "取消",
  cancelled: "已取消",
  close: "关闭",
  code: "错误代码",
  connecting: "正在连接",
  copied: "凭据已复制",
  copyFailed: "浏览器不允许复制",
  copyReceipt: "复制凭据",
  count: "{count} 张，最多 {most} 张",
  delete: "删除",
  deleteAll: "全部删除",
  deleteHint: "图片只保存在此浏览器中，删除后无法恢复。",
  deleteQuestion: "删除全部 {count} 张图片？",
  device: "设备",
  done: "完成",
  download: "下载",
  dtype: "数据类型",
  editThis: "编辑此图",
  empty: "描述一张图片，然后点击“生成”。",
  failed: "没有生成图片",
  forwards: "前向次数",
  gallery: "图库",
  galleryEmpty: "生成的图片保存在这里，仅限此浏览器。",
  galleryLost: "此浏览器无法保存图片：离开页面后图片将丢失。",
  generate: "生成",
  guidance: "引导强度",
  height: "高度",
  images: "图片数量",
  keep: "保留",
  key: "API 密钥",
  keyHint: "仅保留到此标签页关闭为止，且只发送给此服务器。",
  keyTitle: "此服务器需要 API 密钥",
  load: "运行 {running}，等待 {waiting}",
  manifest: "清单",
  memory: "显存",
  model: "模型",
  more: "更多设置",
  negative: "反向提示词",
  negativeHint: "需要引导强度大于 0",
  negativeShown: "不包含：{text}",
  next: "下一张",
  notNow: "暂不",
  phase: "阶段",
  picture: "图片",
  pictureDone: "已完成 {done} / {all}",
  preview: "预览 {index} / {count}",
  previous: "上一张",
  progress: "进度",
  prompt: "提示词",
  promptHint: "图片中应该有什么？",
  queue: "运行中 {running}，等待中 {waiting}，最多等待 {limit}",
  receipt: "凭据",
  remove: "移除",
  requestId: "请求编号",
  restarts: "重启次数",
  result: "结果",
  reuse: "沿用设置",
  reuseSeed: "沿用种子",
  revision: "版本",
  seconds: "秒",
  seed: "种子",
  seedHint: "随机",
  sent: "正在生成",
  sentWaiting: "排队中，共 {waiting} 个请求等待",
  size: "尺寸",
  strength: "改变强度",
  tokens: "提示词词元",
  tooManyPixels: "此服务器最多生成 {most} 像素，约 {edge}×{edge}。",
  truncated: "提示词已截断",
  unreachable: "无法连接服务器，或连接已中断。",
  useKey: "使用密钥",
  width: "宽度",
  worker: "工作进程",
  phase_starting: "正在启动",
  phase_imports: "正在加载程序库",
  phase_verify: "正在校验模型",
  phase_read: "正在读取权重",
  phase_build: "正在构建管线",
  phase_gate: "正在检验预设的图像质量",
  phase_warmup: "正在生成首张图片",
  phase_ready: "就绪",
  phase_busy: "忙碌",
  phase_restarting: "正在重启工作进程",
  phase_failed: "工作进程无法启动",
  phase_draining: "正在停止",
  phase_unreachable: "无法连接",
};

export const LANGUAGES = { en: EN, zh: ZH };
const STORED = "zops-language";
const values = new WeakMap();
let language = "en";

/** Return a text of the present language with its {places} filled; a name that is unknown is its own text. */
export function text(name, filled = {}) {
  const found = LANGUAGES[language][name] ?? name;
  return found.replace(/\{(\w+)\}/g, (_, place) => String(filled[place]));
}

/** Say a text in an element, now and after each switch of the language. */
export function say(element, name, filled = {}) {
  element.dataset.text = name;
  values.set(element, filled);
  const said = text(name, filled);
  // Said again unchanged, it would be read out again.
  if (element.textContent !== said) element.textContent = said;
}

/** Say nothing in an element. */
export function hush(element) {
  delete element.dataset.text;
  element.textContent = "";
}

/** Return a term and its value for a list of facts. */
export function fact(name, value) {
  const term = make("dt");
  say(term, name);
  return [term, make("dd", { textContent: value })];
}

/** Return as much of a manifest's digest as people compare. */
export const shortDigest = ({ manifest_digest: digest }) => digest.slice(0, 12);

/** Say all that is within a root in the present language. */
export function translate(root) {
  for (const element of root.querySelectorAll("[data-text]")) say(element, element.dataset.text, values.get(element));
  for (const element of root.querySelectorAll("[data-label]")) element.ariaLabel = text(element.dataset.label);
  for (const element of root.querySelectorAll("[data-hint]")) element.placeholder = text(element.dataset.hint);
}

/** Copy a template, in the present language; the second value returns its parts by their data-part. */
export function copyOf(templateId) {
  const root = at(templateId).content.firstElementChild.cloneNode(true);
  translate(root);
  return [root, (name) => root.querySelector(`[data-part="${name}"]`)];
}

/** Learn the English that stands in the document. */
function learn(root) {
  for (const { dataset, textContent } of root.querySelectorAll("[data-text]")) EN[dataset.text] ??= textContent;
  for (const { dataset, ariaLabel } of root.querySelectorAll("[data-label]")) EN[dataset.label] ??= ariaLabel;
  for (const { dataset, placeholder } of root.querySelectorAll("[data-hint]")) EN[dataset.hint] ??= placeholder;
}

/** Speak a language from now on; the switch offers the other one. */
function speak(wanted) {
  language = wanted;
  document.documentElement.lang = wanted === "zh" ? "zh-Hans" : "en";
  const other = wanted === "zh" ? "en" : "zh";
  at("language").textContent = other === "zh" ? "中文" : "English";
  at("language").lang = other;
  translate(document);
}

/** Speak the language that was chosen here before, or else the browser's. */
export function beginTexts() {
  for (const root of [document, ...Array.from(document.querySelectorAll("template"), ({ content }) => content)]) learn(root);
  const browser = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
  const stored = localStorage.getItem(STORED);
  speak(stored in LANGUAGES ? stored : browser);
  at("language").addEventListener("click", () => {
    speak(language === "zh" ? "en" : "zh");
    localStorage.setItem(STORED, language);
  });
}
