// The few things that every module does with the document. Text is always text: nothing here reads markup.

/** Return the element with an id. */
export const at = (id) => document.getElementById(id);

/** Make an element with properties and children; children that are strings become text. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
