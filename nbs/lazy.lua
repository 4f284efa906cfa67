-- Pictures below the screen are fetched when the reader comes near them; the first of a page at once.
local first = true

function Image(image)
  if first then
    first = false
  else
    image.attributes["loading"] = "lazy"
  end
  image.attributes["decoding"] = "async"
  return image
end
