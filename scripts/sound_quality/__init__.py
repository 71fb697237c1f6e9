"""How a checkpoint, or an option of the server, sounds: by a judge, by measures of the sound, and to the eye."""
