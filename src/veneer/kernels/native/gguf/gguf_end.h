/* Included behind gguf_unpack.h, before it is included again. */
#undef INLINE
#undef OF_BLOCK
#undef SCALE_AT
#undef OFFSET_AT
#undef OF_KIND
#undef OF_ANY_KIND
#undef NAME
#undef TARGET
#undef LEVEL
#undef W
