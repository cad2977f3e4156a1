// The images of this browser with their receipts, in IndexedDB: newest last, the oldest make room.

/** The most images that are kept; of 1024x1024 they take about 100 MB. */
export const MOST = 60;
const STORE = "pictures";

/**
 * Open the album. Where the browser keeps nothing (a private window, for example) it lives as long as the page.
 *
 * A picture is {id, file, prompt, negative, receipt}; `id` is given by `add`.
 */
export async function openAlbum() {
  try {
    return new StoredAlbum(await openDatabase());
  } catch {
    return new PassingAlbum();
  }
}

class StoredAlbum {
  constructor(database) {
    this.lasting = true;
    this.database = database;
  }

  all() {
    return this.within("readonly", (store) => store.getAll());
  }

  /** Keep a picture and return its id. */
  async add(picture) {
    const id = await this.within("readwrite", (store) => store.add(picture));
    const ids = await this.within("readonly", (store) => store.getAllKeys());
    for (const old of ids.slice(0, -MOST)) await this.remove(old);
    return id;
  }

  remove(id) {
    return this.within("readwrite", (store) => store.delete(id));
  }

  clear() {
    return this.within("readwrite", (store) => store.clear());
  }

  async within(mode, act) {
    const transaction = this.database.transaction(STORE, mode);
    const request = act(transaction.objectStore(STORE));
    await new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    return request.result;
  }
}

class PassingAlbum {
  lasting = false;
  pictures = new Map();
  last = 0;

  async all() {
    return [...this.pictures.values()];
  }

  async add(picture) {
    this.last += 1;
    this.pictures.set(this.last, { ...picture, id: this.last });
    for (const old of [...this.pictures.keys()].slice(0, -MOST)) this.pictures.delete(old);
    return this.last;
  }

  async remove(id) {
    this.pictures.delete(id);
  }

  async clear() {
    this.pictures.clear();
  }
}

function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open("zops", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}
